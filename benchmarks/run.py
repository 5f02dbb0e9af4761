"""Run the benchmarks and write what they found: `python benchmarks/run.py [--quick] [MEASURE ...]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lab
from measures import MEASURES
from targets import table

RESULTS = Path(__file__).with_name("results")
LONGEST_S = 420
"""Of one measure; on a quiet machine none takes half of it."""


def main() -> int:
    """Run the chosen measures one after the other; return how many failed."""
    parser = argparse.ArgumentParser(description="Measure the gateway; see benchmarks/README.md.")
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--quick", action="store_true", help="small counts: does it run; writes no results")
    options = parser.parse_args()
    unknown = set(options.measures) - set(MEASURES)
    if unknown:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that what was started is stopped
    machine = describe_machine()
    print("\n".join(machine), flush=True)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name in options.measures or MEASURES:
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        try:
            with nothing_left(), at_most(LONGEST_S):
                found[name] = MEASURES[name](options.quick)
        except Exception as error:  # noqa: BLE001 - one measure that fails must not lose the others
            failed[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"  {failed[name]}", flush=True)
        else:
            print("\n".join(f"  {line}" for line in lines(found[name])), flush=True)
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    print("", *table(found, failed), sep="\n", flush=True)
    if not options.quick:
        write(found, failed, machine)
    return len(failed)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block when the time is over."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def nothing_left() -> Iterator[None]:
    """Kill whatever of our own children is still there at the end, and give back the cores."""
    try:
        yield
    finally:
        os.sched_setaffinity(0, lab.ALL)
        for pid in lab.descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def lines(figures: Mapping[str, Any]) -> list[str]:
    """One line per figure, the sides beside each other."""
    out = []
    sides: dict[str, dict[str, float]] = figures.get("sides", {})
    for key in dict.fromkeys(key for side in sides.values() for key in side):
        values = ", ".join(f"{name} {_shown(side[key])}" for name, side in sides.items() if key in side)
        out.append(f"{key}: {values}")
    out += [f"{name}: {_shown(value)}" for name, value in figures.items() if name != "sides"]
    return out


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def describe_machine() -> list[str]:
    """Processor, memory, kernel, interpreter, code: what a reader needs to judge the figures; no names of hosts."""
    cpu = _first("/proc/cpuinfo", "model name") or platform.machine()
    memory = int((_first("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 1024 / 1024
    busy = os.getloadavg()[0]
    return [
        f"- {os.cpu_count()} cores, {cpu}, {memory:.0f} GB of memory; load average at the start {busy:.2f}",
        f"- {platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}",
        f"- commit {_output('git', 'rev-parse', '--short', 'HEAD') or 'unknown'}"
        + (" with changes" if _output("git", "status", "--porcelain", "--untracked-files=no", "src") else ""),
    ]


def _first(file: str, field: str) -> str | None:
    with suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=lab.ROOT, capture_output=True, text=True, check=False).stdout.strip()


def write(found: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str], machine: list[str]) -> None:
    """Store the figures, and one page of all that are stored."""
    RESULTS.mkdir(exist_ok=True)
    for name, figures in found.items():
        stored = json.dumps({"machine": machine, "figures": figures}, indent=1, ensure_ascii=False)
        (RESULTS / f"{name}.json").write_text(stored + "\n", encoding="utf-8")
    known, machines = dict[str, Mapping[str, Any]](), dict[str, list[str]]()
    for name in MEASURES:
        with suppress(FileNotFoundError, KeyError):
            stored_run = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            known[name], machines[name] = stored_run["figures"], stored_run["machine"]
    page = ["# Results", "", *machine, "", "    make bench-peers", "    make bench", ""]
    page += ["Ratios inside one run are what counts; `×1.00` of an agent call is `Runner.run` in process.", ""]
    page += table(known, failed)
    for name, figures in known.items():
        page += ["", f"## {name}", ""]
        if machines[name] != machine:
            page += ["From another run:", *machines[name], ""]
        page += [f"- {line}" for line in lines(figures)]
    (RESULTS / "summary.md").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
