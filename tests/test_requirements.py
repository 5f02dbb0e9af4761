"""The manifest tells the truth: every named test exists, and no promise is both proved and unbuilt."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.requirements import NOT_YET_BUILT, PROVED, STILL_MISSING

TESTS = Path(__file__).parent


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("promise", PROVED)
def test_every_named_test_exists(promise: str) -> None:
    assert PROVED[promise], f"{promise} names no test"
    for test in PROVED[promise]:
        file, _, name = test.partition("::")
        assert (TESTS / file).is_file(), f"{promise}: tests/{file} does not exist"
        assert name in names_in(file), f"{promise}: tests/{file} has no {name}"


def test_no_promise_is_both_proved_and_unbuilt() -> None:
    unbuilt = frozenset[str]().union(*NOT_YET_BUILT.values())
    assert not unbuilt & set(PROVED)
    assert sum(map(len, NOT_YET_BUILT.values())) == len(unbuilt), "a promise stands under two capabilities"


def test_what_is_kept_in_part_is_proved_as_far_as_it_goes() -> None:
    assert STILL_MISSING.keys() <= PROVED.keys()
    assert all(STILL_MISSING.values())
