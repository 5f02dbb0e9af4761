"""The state file of `gateway dev`: where the gateway of this folder answers, so that other commands find it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.config import Settings
from gateway_cli.errors import CliError


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that runs on this machine."""

    pid: int
    url: str


def state_file(settings: Settings) -> Path:
    """Return ``gateway.json`` in the state folder (`GATEWAY_STATE_DIR`)."""
    return settings.state_folder() / "gateway.json"


@contextmanager
def announce(settings: Settings, url: str) -> Iterator[None]:
    """Say that this process answers at ``url``, until the block ends."""
    path = state_file(settings)
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(asdict(Running(os.getpid(), url))), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise CliError(
            f"The state folder {path.parent} cannot be written to ({error.strerror}); set GATEWAY_STATE_DIR to one "
            "that can."
        ) from error
    try:
        yield
    finally:
        current = find_running(settings)
        if current is not None and current.pid == os.getpid():
            path.unlink(missing_ok=True)


def find_running(settings: Settings) -> Running | None:
    """Return the gateway that the state file names; None without a file, or when its process is gone."""
    try:
        data = json.loads(state_file(settings).read_text(encoding="utf-8"))
        running = Running(pid=int(data["pid"]), url=str(data["url"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return running if _is_alive(running.pid) else None


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there; a stale file is noticed when nothing answers
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
