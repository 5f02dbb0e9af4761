"""Installs the requirements.txt files that stand next to drop-in agents, after showing what they are.

    python scripts/install_agent_deps.py [--root src/agents] [--agent NAME ...] [--dry-run]

Nothing is installed by the gateway itself: an agent whose requirements are not met is listed with a diagnostic that
says what is missing. The packages go into the interpreter that runs the script. Packages that the gateway's own lock
pins are held at the pinned version, so that an agent cannot break the gateway it runs in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Install what the chosen agents ask for; return pip's exit code, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(description="Install the requirements of drop-in agents.")
    parser.add_argument("--root", type=Path, default=Path("src/agents"), help="folder of agents (default: src/agents)")
    parser.add_argument("--agent", action="append", metavar="NAME", help="only this agent's folder (repeatable)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be installed")
    arguments = parser.parse_args(argv)
    if not arguments.root.is_dir():
        parser.error(f"{arguments.root} is not a folder")
    files = find_requirements(arguments.root, arguments.agent)
    missing = set(arguments.agent or ()) - {agent_of(file, arguments.root) for file in files}
    if missing:
        parser.error(f"no requirements.txt for {', '.join(sorted(missing))} below {arguments.root}")
    if not files:
        print(f"No agent below {arguments.root} has a requirements.txt.")
        return 0
    for file in files:
        print(f"{file}:")
        print(
            "".join(f"    {line}\n" for line in file.read_text(encoding="utf-8").splitlines() if line.strip()), end=""
        )
    return 0 if arguments.dry_run else install(files)


def find_requirements(root: Path, agents: Sequence[str] | None) -> list[Path]:
    """Return the requirements.txt files next to an agent.py, of every agent or of those named."""
    found = sorted(file for file in root.rglob("requirements.txt") if (file.parent / "agent.py").is_file())
    return found if agents is None else [file for file in found if agent_of(file, root) in agents]


def agent_of(file: Path, root: Path) -> str:
    """Return the agent's folder as it is named below the root, e.g. ``labs/Research``."""
    return file.parent.relative_to(root).as_posix()


def install(files: Sequence[Path]) -> int:
    """Install all files in one pip run, with the gateway's own versions as constraints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install"]
        for file in files:
            command += ["--requirement", str(file)]
        if LOCK.is_file():
            pins = Path(folder) / "constraints.txt"
            pins.write_text("\n".join(read_pins(LOCK)), encoding="utf-8")
            command += ["--constraint", str(pins)]
        return subprocess.run(command, check=False).returncode


def read_pins(lock: Path) -> list[str]:
    """Return the ``name==version`` lines of a lock, without hashes (pip refuses those for constraints of others)."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return [line.rstrip(" \\") for line in lines if line[:1].isalnum() and "==" in line]


if __name__ == "__main__":
    sys.exit(main())
