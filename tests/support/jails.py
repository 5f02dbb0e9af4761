"""Jails in tests: whether this machine can make any, and what runs in them as the machine sees it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_PROGRAMS = ("bwrap", "choom", "prlimit", "setpriv", "timeout", "bash")


@cache
def why_no_jail() -> str | None:
    """Say what is missing for jails on this machine."""
    if sys.platform != "linux":
        return "jails need Linux"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt install bubblewrap util-linux)"
    made = subprocess.run(
        ["bwrap", "--unshare-user", "--unshare-pid", "--disable-userns", "--dev-bind", "/", "/", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if made.returncode == 0 else f"this machine makes no jails: {made.stderr.strip()}"


needs_jail = pytest.mark.skipif(
    why_no_jail() is not None and not os.environ.get("GATEWAY_TEST_JAIL"), reason=str(why_no_jail())
)
"""Skips a test where the machine makes no jails; where ``GATEWAY_TEST_JAIL`` is set it fails."""


def processes_with(mark: str) -> list[int]:
    """Return the processes, in whatever namespace, whose command line holds a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return found
