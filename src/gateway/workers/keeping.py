"""ConfigKeeper: the configuration that a gateway's workers serve, so that one that is started later serves the same.

The disk may say something else by then: a file that is wrong holds no worker up. The texts are in the supervisor's
memory alone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from gateway.config import ConfigFile, reading_config
from gateway.observability.logs import log_event
from gateway.workers.peer import CallFailed
from gateway.workers.workers import Workers

_LOG = logging.getLogger("gateway.workers")
_TIMEOUT_S = 5.0

Files = dict[str, ConfigFile]


class ConfigKeeper:
    """One worker's part: it tells the supervisor what it has read and serves, and asks for it at its start."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._served: Files = {}

    def keeping(self, reload: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """Return ``reload``; what it reads is kept where it succeeds."""

        async def kept() -> None:
            with reading_config() as reading:
                await reload()
            self.keep(reading.files)

        return kept

    def keep(self, files: Mapping[str, ConfigFile]) -> None:
        """Note files that are served from now on."""
        fresh = {name: file for name, file in files.items() if self._served.get(name) != file}
        if fresh:
            self._served |= fresh
            with suppress(CallFailed):  # the supervisor is gone, and this worker ends soon
                self._workers.notify_supervisor("config.keep", msgspec.to_builtins(fresh))

    async def fetch(self) -> Files:
        """Return what the others serve; nothing where there is nobody else, or where it could not be started with."""
        if self._workers.is_alone:
            return {}
        try:
            found = await self._workers.ask_supervisor("config.kept", self._workers.slot, timeout_s=_TIMEOUT_S)
        except CallFailed:
            return {}
        return msgspec.convert(found, Files)

    async def changed(self) -> Collection[str]:
        """Return the names of files of which the others serve another text by now."""
        return [name for name, file in (await self.fetch()).items() if self._served.get(name) != file]


def log_differences(kept: Mapping[str, ConfigFile]) -> None:
    """Say which files this worker serves as they were kept, and not as the disk has them."""
    files = {name: file for name, file in kept.items() if file.path is not None}
    differing = sorted(name for name, file in files.items() if _on_disk(str(file.path)) != file.text)
    if differing:
        log_event(
            _LOG,
            "config.kept",
            level=logging.WARNING,
            message="The configuration that the other workers serve is served here as well: the disk has another one.",
            files=differing,
        )


def _on_disk(path: str) -> Any:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
