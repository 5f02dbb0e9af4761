"""Reloader: watches drop-in folders, helper files and YAML, and has reloaded what changed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from watchfiles import awatch

from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.observability.logs import log_event
from gateway.registry.catalogue import AgentCatalogue, RefreshReport

_LOG = logging.getLogger(__name__)
_STEP_MS = 20
_DEBOUNCE_MS = 200
_RETRY_S = 1.0
_NOISE = (".pyc", ".pyo", ".swp", ".swx", ".tmp", "~")
_SKIPPED = frozenset({"__pycache__", "node_modules"})


class Reloader:
    """Turns changes on disk into refreshes.

    ``on_change`` maps the name of a YAML file (``upstreams.yaml``, ``security.yaml``) to what reloads it; a callback
    raises `ConfigError` to keep the old version. `agents.yaml` belongs to the catalogue. ``referred`` says which other
    files a YAML file names now: a change of one is a change of it.
    """

    def __init__(
        self,
        settings: Settings,
        catalogue: AgentCatalogue,
        roots: Sequence[Path],
        *,
        on_change: Mapping[str, Callable[[], Awaitable[object]]] | None = None,
        referred: Mapping[str, Callable[[], Collection[Path]]] | None = None,
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._roots = tuple(roots)
        self._on_change = dict(on_change or {})
        self._referred = {name: files for name, files in (referred or {}).items() if name in self._on_change}
        self._tasks: set[asyncio.Task[object]] = set()
        self._seen = {name: self._stamp(name) for name in self._on_change}

    async def refresh_agents(self, *, force: bool = True) -> RefreshReport:
        """Look at every drop-in and at `agents.yaml`; import what changed, and try again what failed."""
        return await self._catalogue.refresh(force=force)

    async def watch(self) -> None:
        """Watch until cancelled, or until the platform cannot."""
        log_event(_LOG, "agent.watch.started", roots=len(self._roots), files=[*self._on_change, "agents.yaml"])
        try:
            await self._watch()
        except (OSError, RuntimeError) as error:
            log_event(
                _LOG,
                "agent.watch.disabled",
                level=logging.ERROR,
                message="Files cannot be watched here; POST /agents/refresh still works. On Linux, raise "
                "fs.inotify.max_user_watches, or set WATCHFILES_FORCE_POLLING=1.",
                exc_info=error,
            )
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            log_event(_LOG, "agent.watch.stopped")

    async def _watch(self) -> None:
        """Watch one set of folders at a time; when the set has changed, watch the new one and look at everything."""
        while True:
            deep, flat = self._folders()
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                if deep:
                    group.create_task(self._follow(deep, stop, recursive=True))
                if flat:
                    group.create_task(self._follow(flat, stop, recursive=False))
                group.create_task(self._notice_new_folders(deep, flat, stop))
                self._start(self._look())

    async def _look(self) -> None:
        """Reload what changed while no watch stood."""
        for name, reload in self._on_change.items():
            if self._stamp(name) != self._seen[name]:
                self._start(self._reload(name, reload))
        await self._catalogue.refresh()

    async def _notice_new_folders(self, deep: Collection[Path], flat: Collection[Path], stop: asyncio.Event) -> None:
        """Set ``stop`` when other folders have to be watched: a root appeared, a helper elsewhere was imported."""
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _RETRY_S)
            if self._folders() != (deep, flat):
                stop.set()

    async def _follow(self, folders: Collection[Path], stop: asyncio.Event, *, recursive: bool) -> None:
        async for changes in awatch(
            *folders,
            watch_filter=lambda change, path: _is_interesting(path, folders),
            debounce=_DEBOUNCE_MS,
            step=_STEP_MS,
            stop_event=stop,
            recursive=recursive,
            ignore_permission_denied=True,
        ):
            self._handle({Path(path) for _, path in changes})
        stop.set()  # the platform ended the watch (a folder was moved away): begin anew

    def _handle(self, paths: set[Path]) -> None:
        """Start what the changes ask for; nothing is awaited, so that a load that hangs delays no later change."""
        names = {path.name for path in paths}
        for name, reload in self._on_change.items():
            if name in names or self._refers(name, paths):
                self._start(self._reload(name, reload))
        own = self._catalogue.tracked_files()
        agents = {p for p in paths if p in own or p.name == "agents.yaml" or any(map(p.is_relative_to, self._roots))}
        if agents:
            self._start(self._catalogue.refresh(paths=agents))

    def _refers(self, name: str, paths: set[Path]) -> bool:
        """Whether a change is of a file that a YAML file names; a mounted secret changes by swapping ``..data``."""
        if name not in self._referred:
            return False
        files = {(file.parent.resolve(), file.name) for file in self._referred[name]()}
        folders = {folder for folder, _ in files}
        return any(
            (path.parent, path.name) in files or (path.name.startswith("..") and path.parent in folders)
            for path in paths
        )

    async def _reload(self, name: str, reload: Callable[[], Awaitable[object]]) -> None:
        self._seen[name] = self._stamp(name)
        try:
            await reload()
        except GatewayError as error:
            log_event(_LOG, "config.reload.failed", level=logging.ERROR, file=name, message=error.message)
        else:
            log_event(_LOG, "config.reload.done", file=name)

    def _stamp(self, name: str) -> tuple[object, ...]:
        """Return what changes with a YAML file: where it is found, and which version of it."""
        try:
            path = self._settings.config_file(name)
            if path is None:
                return ()
            found = path.stat()
        except (GatewayError, OSError):
            return ()
        return path, found.st_ino, found.st_mtime_ns, found.st_size

    def _folders(self) -> tuple[frozenset[Path], frozenset[Path]]:
        """Return the folders to watch with everything below them, and those to watch themselves."""
        deep = frozenset(root for root in self._roots if root.is_dir())
        flat = {path.parent for path in self._catalogue.tracked_files()}
        for name in (*self._on_change, "agents.yaml"):
            flat |= {folder.resolve() for folder in self._config_folders(name)}
        flat |= {file.parent.resolve() for files in self._referred.values() for file in files()}
        outside = (f for f in flat if f.is_dir() and not any(f.is_relative_to(root) for root in deep))
        return deep, frozenset(outside)

    def _config_folders(self, name: str) -> set[Path]:
        """Where a YAML file is, or would be found first."""
        found = {self._settings.agents_root().resolve().parent / "config"}
        with suppress(GatewayError):
            path = self._settings.config_file(name)
            if path is not None:
                found.add(path.resolve().parent)
        return found

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_interesting(path: str, folders: Collection[Path]) -> bool:
    """Whether a change may matter: not caches, not an editor's or a tool's own files.

    Names that begin with ``..`` count: a mounted ConfigMap changes by swapping ``..data``.
    """
    if path.endswith(_NOISE):
        return False
    root = next((folder for folder in folders if path.startswith(f"{folder}{os.sep}")), None)
    parts = path.removeprefix(str(root)).split(os.sep)
    return not any(p in _SKIPPED or (p.startswith(".") and not p.startswith("..")) for p in parts)
