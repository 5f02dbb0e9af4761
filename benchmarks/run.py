"""Run the benchmarks and write what they found: `python benchmarks/run.py [--quick] [MEASURE ...]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from measures import MEASURES

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    """Run the chosen measures one after the other."""
    parser = argparse.ArgumentParser(description="Measure the gateway; see benchmarks/README.md.")
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--quick", action="store_true", help="small counts: does it run at all")
    options = parser.parse_args()
    unknown = set(options.measures) - set(MEASURES)
    if unknown:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    for name in options.measures or MEASURES:
        started = time.perf_counter()
        figures = MEASURES[name](options.quick)
        print(f"\n{name} ({time.perf_counter() - started:.0f} s)", flush=True)
        print("\n".join(f"  {line}" for line in lines(figures)), flush=True)
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if not options.quick:
        write_summary()


def lines(figures: dict[str, Any]) -> list[str]:
    """One line per figure; a row of several sides as ratio first."""
    out = []
    for name, value in figures.items():
        if isinstance(value, dict):
            stock, http, ratio = value["stock"], value["http"], value["ratio"]
            out.append(
                f"{name}: CPU ×{ratio['cpu_ms']:.2f} ({http['cpu_ms']:.2f} against {stock['cpu_ms']:.2f} ms), "
                f"p50 ×{ratio['p50_us']:.2f} ({http['p50_us'] / 1000:.2f} against {stock['p50_us'] / 1000:.2f} ms)"
            )
        else:
            out.append(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    return out


def write_summary() -> None:
    """Put all stored figures into one page."""
    page = [
        "# Results",
        "",
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}. "
        "Ratios inside one run are what counts. `×1.00` is `Runner.run` in process with the stock openai client.",
    ]
    for name in MEASURES:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            page += ["", f"## {name}", ""]
            page += [f"- {line}" for line in lines(json.loads(path.read_text(encoding="utf-8")))]
    (RESULTS / "summary.md").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
