"""Refresher: reads the configuration again on request, in every worker, and says whether all serve the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Literal

import msgspec

from gateway.config import Settings
from gateway.errors import GatewayError, WorkersDisagree
from gateway.observability.logs import log_event
from gateway.registry.registry import Registry
from gateway.workers.peer import CallFailed
from gateway.workers.workers import Workers, shared_failure

Reload = Callable[[], Awaitable[object]]
Part = Literal["agents", "upstreams", "security", "tools"]

_LOG = logging.getLogger("gateway.refreshing")
_CALL = "refresh"
_TIMEOUT_S = 120.0
_TRIES = 3


class Refreshed(msgspec.Struct, frozen=True):
    """What all workers serve now: a hash over the agents and the files that were read, the same in each."""

    content_hash: str
    workers: int


class Refresher:
    """Knows how each part of the configuration is read again.

    ``parts`` maps a part to what reloads it and the YAML files it reads. ``files`` maps every YAML file to its reload:
    all of them, then the agents, are what SIGHUP asks for.
    """

    def __init__(
        self,
        settings: Settings,
        workers: Workers,
        registry: Callable[[], Registry],
        *,
        parts: Mapping[Part, tuple[Reload, tuple[str, ...]]],
        files: Mapping[str, Reload],
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._registry = registry
        self._parts = parts
        self._files = files
        workers.handle(_CALL, self._here)

    async def refresh(self, part: Part) -> Refreshed:
        """Read a part again everywhere and return when every worker serves the same.

        Raises what every worker says alike, such as `ConfigError` for a file that is wrong (then nothing has changed);
        `WorkersDisagree` naming the workers that do not serve what the others do.
        """
        if self._workers.is_alone:
            return Refreshed(await self._here(part), 1)
        for _ in range(_TRIES):
            try:
                replies = await self._workers.everywhere(_CALL, part, timeout_s=_TIMEOUT_S)
            except CallFailed as error:
                raise WorkersDisagree(f"The other workers cannot be asked: {error}.", retry_after_s=1) from error
            failed = shared_failure(replies)
            if failed is not None:
                raise failed
            hashes = {reply.value for reply in replies}
            if len(hashes) == 1:
                return Refreshed(hashes.pop(), len(replies))
            if None in hashes:
                break  # one could not; otherwise a file changed between two of them, and another look settles it
        told = "; ".join(f"worker {reply.slot} (pid {reply.pid}): {reply.error or reply.value}" for reply in replies)
        raise WorkersDisagree(f"Not every worker serves the same after the refresh. {told}.", retry_after_s=1)

    async def reload_everything(self) -> None:
        """Read every file and every agent again, in this process; what is wrong is logged, and the old holds."""
        await self.reload_files(self._files)
        await self._parts["agents"][0]()

    async def reload_files(self, names: Collection[str]) -> None:
        """Read these files again, in this process; what is wrong is logged, and the old holds."""
        done: set[Reload] = set()
        for name, reload in self._files.items():
            if reload in done or name not in names:
                continue
            done.add(reload)
            try:
                await reload()
            except GatewayError as error:
                log_event(_LOG, "config.reload.failed", level=logging.ERROR, file=name, message=error.message)
            else:
                log_event(_LOG, "config.reload.done", file=name)
        if "agents.yaml" in names:
            await self._parts["agents"][0]()

    async def _here(self, part: Part) -> str:
        """Reload a part in this process and return the hash of what it serves now."""
        reload, names = self._parts[part]
        for _ in range(_TRIES):
            before = self._hash_files(names)
            await reload()
            if self._hash_files(names) == before:
                break
        return self._content_hash(before)

    def _hash_files(self, names: Iterable[str]) -> str:
        found = hashlib.sha256()
        for name in sorted(names):
            with suppress(OSError, GatewayError):
                path = self._settings.config_file(name)
                found.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest() if path else ''}\n".encode())
        return found.hexdigest()

    def _content_hash(self, files: str) -> str:
        entries = [
            (entry.id, entry.file, entry.content_hash, entry.status) for entry in self._registry().list_entries()
        ]
        return hashlib.sha256(msgspec.json.encode([files, entries])).hexdigest()[:16]
