"""A key reaches what its patterns match on the canonical id, and nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.principal import Principal
from gateway.security.acl import allows, find_pattern


def principal(*allow: str) -> Principal:
    return Principal(id="k", key_id="k", allow=allow)


@pytest.mark.parametrize(
    ("allow", "model", "expected"),
    [
        (("*",), "default/weather", True),
        (("default/*",), "default/weather", True),
        (("default/*",), "defaults/weather", False),
        (("default/weather",), "default/weather", True),
        (("default/weather",), "default/weather2", False),
        (("team/*", "default/w?ather"), "default/weather", True),
        (("default/[a-f]*",), "default/weather", False),
        ((), "default/weather", False),
        (("*",), "default/wéather", False),
        (("default/*",), "Default/weather", False),
    ],
)
def test_patterns(allow: tuple[str, ...], model: str, expected: bool) -> None:
    assert allows(principal(*allow), model) is expected


def test_the_granting_pattern_is_named() -> None:
    assert find_pattern(principal("team/*", "default/*"), "default/weather") == "default/*"
    assert find_pattern(principal("team/*"), "default/weather") is None


names = st.text("ab/-", min_size=1, max_size=8)


@given(st.lists(st.text("ab/-*?", min_size=1, max_size=6), max_size=4), names)
def test_it_agrees_with_a_reference_written_another_way(patterns: list[str], model: str) -> None:
    expected = any(
        re.fullmatch("".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in p), model)
        for p in patterns
    )
    assert allows(principal(*patterns), model) is expected
