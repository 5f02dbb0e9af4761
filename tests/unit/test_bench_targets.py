"""The table that `make bench` prints: what is met, what is missed, what was not measured."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def targets() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import targets  # noqa: PLC0415 - the folder is no package

        yield targets
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("targets", None)


def rows(table: list[str]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]
    return {cell[1]: cell for cell in cells}


def test_all_sixteen_targets_have_rows_of_measures_that_exist(targets: ModuleType) -> None:
    assert {target.number for target in targets.TARGETS} == set(range(1, 17))
    measures = set(re.findall(r'^    "(\w+)": \w+,$', (BENCHMARKS / "measures.py").read_text("utf-8"), re.MULTILINE))
    assert {target.measure for target in targets.TARGETS} <= measures
    assert len(rows(targets.table({}, {}))) == len(targets.TARGETS), "two rows of one name"


def test_figures_are_held_against_their_targets(targets: ModuleType) -> None:
    found = {
        "pass_through": {
            "sides": {"gateway": {"p99, 1 at once, µs": 750.0}},
            "CPU per call: litellm ÷ ours": 100.0,
            "requests/s: ours ÷ portkey": 5.0,
        },
        "growth": {"ratio": 1.3},
    }
    shown = rows(targets.table(found, {"scrape": "failed: TimeoutError"}))
    assert shown["p99, 1 connection"][2:] == ["≤ 500 µs", "750 µs", "1.50", "**missed**"]
    assert shown["the same: LiteLLM ÷ ours"][2:] == ["≥ 75 ×", "100 ×", "0.75", "met"]
    assert shown["the same ÷ Portkey"][2:] == ["≥ 10 ×", "5 ×", "2.00", "**missed**"]
    assert shown["CPU per call: 10,000 keys and models ÷ 10"][3:] == ["1.3 ×", "1.00", "met"]
    assert shown["loop blocked by a scrape of 1,000 label sets"][3:] == ["–", "–", "failed: TimeoutError"]
    assert shown["RSS with agents"][3:] == ["–", "–", "not measured in this run"]
