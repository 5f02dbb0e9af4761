"""Install the gateways that ours is compared with: `python benchmarks/peers/install.py`, or `make bench-peers`.

Each gets an environment of its own under `build/peers`. One that cannot be installed is named with the reason, and
the other is installed all the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "build" / "peers"
STAMP = ".installed"


def main() -> int:
    """Install what is missing; return how many could not be."""
    failed = 0
    for name, (recipe, install) in PEERS.items():
        folder = TARGET / name
        stamp = folder / STAMP
        wanted = recipe.read_text(encoding="utf-8")
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            print(f"{name}: installed already")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        try:
            install(folder, recipe)
        except (OSError, subprocess.CalledProcessError) as error:
            failed += 1
            print(f"{name}: NOT installed: {error}", file=sys.stderr)
        else:
            stamp.write_text(wanted, encoding="utf-8")
            print(f"{name}: installed into {folder.relative_to(HERE.parents[1])}")
    return failed


def _litellm(folder: Path, recipe: Path) -> None:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", str(recipe))
    # Compiled now: a server that may not write its cache would compile everything at each start.
    _run(python, "-m", "compileall", "-q", "-j", "0", str(folder / "lib"), accept=(0, 1))


def _portkey(folder: Path, recipe: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise FileNotFoundError("node and npm are not on PATH")
    folder.mkdir(parents=True)
    shutil.copy(recipe, folder / "package.json")
    _run(npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--prefix", str(folder))


def _run(*command: str, accept: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        last = (done.stderr.strip() or done.stdout.strip())[-2_000:]
        raise OSError(f"{Path(command[0]).name} ended with {done.returncode}: {last}")


PEERS: dict[str, tuple[Path, Callable[[Path, Path], None]]] = {
    "litellm": (HERE / "litellm.txt", _litellm),
    "portkey": (HERE / "package.json", _portkey),
}


if __name__ == "__main__":
    sys.exit(main())
