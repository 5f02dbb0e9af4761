"""Workspaces: the folder that a jailed tool works in, one for each caller, and how much it holds."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from gateway.config import Settings
from gateway.errors import ConfigError, ToolUnavailable
from gateway.tools.builtin.jail import NOBODY
from gateway.tools.config import FILE, JailedTool

_FOLDER = "workspaces"
_SHARED = "shared"
_UNSAFE = re.compile(r"[^a-z0-9]+")


class Held(Struct, frozen=True, kw_only=True):
    """What a workspace holds. ``is_measured`` is false where a part of it cannot be looked at."""

    files: int = 0
    size: int = 0
    is_measured: bool = True


class Workspaces:
    """The workspaces of one entry."""

    def __init__(self, entry: JailedTool, settings: Settings) -> None:
        """Raise `ConfigError` for a folder that would show, or change, what is the gateway's own."""
        self._entry = entry
        own = settings.state_folder() / _FOLDER
        root = Path(entry.workspace).absolute() if entry.workspace is not None else own
        for folder in folders_of_the_gateway(settings):
            if folder.is_relative_to(root) or folder.resolve().is_relative_to(root.resolve()):
                raise ConfigError("workspace: the folder holds folders of the gateway itself; choose one of its own.")
        agents = settings.agents_root().resolve()
        if root.resolve().is_relative_to(agents):
            raise ConfigError("workspace: files in the agents folder are run by the gateway; choose another folder.")
        self._root = root
        self._shared = root if entry.workspace is not None else root / _SHARED

    async def open(self, key_id: str) -> Path:
        """Return the workspace of a caller, made if it is not there; `ToolUnavailable` where that fails."""
        folder = self._shared if self._entry.shared else self._root / folder_name(key_id)
        try:
            await asyncio.to_thread(_made, folder)
        except OSError as error:
            raise ToolUnavailable(
                f"The tool '{self._entry.name}' has no workspace: its folder cannot be made. The operator finds the "
                "folder in tools.yaml, or as GATEWAY_STATE_DIR.",
                should_retry=False,
            ) from error
        return folder

    async def measure(self, folder: Path, *, most: Held | None = None) -> Held:
        """Return what a workspace holds; counting ends where it is more than ``most``."""
        files = self._entry.max_workspace_files if most is None else most.files
        return await asyncio.to_thread(_measured, folder, files)

    def bound(self, held: Held) -> Held:
        """Return what a job may leave behind in a workspace that holds this much: one that is full cannot grow."""
        return Held(
            files=max(held.files, self._entry.max_workspace_files), size=max(held.size, self._entry.max_workspace_bytes)
        )

    def room(self, held: Held) -> int:
        """Return how many bytes may still be written."""
        if not held.is_measured or held.files >= self._entry.max_workspace_files:
            return 0
        return max(0, self._entry.max_workspace_bytes - held.size)

    def full(self) -> str:
        """Say what the bound is."""
        return (
            f"The workspace holds at most {self._entry.max_workspace_bytes:,} bytes in "
            f"{self._entry.max_workspace_files:,} files, and no folders that cannot be looked into. Delete some."
        )


def folders_of_the_gateway(settings: Settings) -> Sequence[Path]:
    """Return where the gateway's own files are: nobody in a jail may see them, wherever they lie."""
    folders = [settings.state_folder(), settings.agents_root(), Path.cwd()]
    config = settings.config_file(FILE)
    if config is not None:
        folders.append(config.parent)
    return [folder.absolute() for folder in folders]


def folder_name(key_id: str) -> str:
    """Return the name of a key's folder: what can be read of the id, and a hash, so that no two keys have the same."""
    readable = _UNSAFE.sub("-", key_id.lower()).strip("-")[:32]
    return f"{readable or 'key'}-{hashlib.sha256(key_id.encode()).hexdigest()[:16]}"


def _made(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)


def _measured(folder: Path, most: int) -> Held:
    """Count without following a link. Sparse files count as large as they claim to be: so does the kernel's bound."""
    files = size = 0
    is_measured = True
    waiting = [os.fspath(folder)]
    while waiting and files <= most:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    files += 1
                    found = entry.stat(follow_symlinks=False)
                    size += max(found.st_size, found.st_blocks * 512)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if files > most:
                        break
        except FileNotFoundError:
            continue  # deleted while it was counted
        except OSError:
            is_measured = False  # no right to look, or a path too long to follow
    return Held(files=files, size=size, is_measured=is_measured)
