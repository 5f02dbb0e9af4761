"""A key reaches what its patterns match on the canonical id, and nothing else; an override adds to that for a while."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest, NotFound
from gateway.principal import Principal
from gateway.security.acl import AccessList, Decision, Override
from gateway.security.overrides import LONGEST_S, MOST, OverrideBook
from tests.support.reference_acl import Grants, decide, matches

KEYS = AccessList()


def principal(*allow: str, by_namespace: tuple[str, ...] = (), key_id: str = "k") -> Principal:
    return Principal(id=key_id, key_id=key_id, allow=allow, allow_by_namespace=by_namespace)


def override(agent: str, *, key_id: str | None = None, seconds: float = 60) -> Override:
    return Override("ovr_1", agent, time.time() + seconds, "an incident", key_id)


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
    assert KEYS.allows(principal(*allow), model) is expected
    assert KEYS.decide(principal(*allow), model).allowed is expected


def test_the_granting_pattern_is_named() -> None:
    assert KEYS.decide(principal("team/*", "default/*"), "default/weather") == Decision(True, "api_key", "default/*")
    assert KEYS.decide(principal("team/*"), "default/weather") == Decision(False, "deny")


def test_the_order_is_override_then_namespace_default_then_the_keys_own() -> None:
    asked = principal("default/*", by_namespace=("default/w*",))
    granted = override("default/weather")
    assert AccessList((granted,)).decide(asked, "default/weather") == Decision(
        True, "override", "default/weather", granted
    )
    assert KEYS.decide(asked, "default/weather") == Decision(True, "namespace_default", "default/w*")
    assert KEYS.decide(asked, "default/other") == Decision(True, "api_key", "default/*")


def test_an_override_holds_for_its_key_and_its_time_and_not_for_drop_ins() -> None:
    nobody, somebody = principal(key_id="nobody"), principal(key_id="somebody")
    only = AccessList((override("labs/*", key_id="somebody"),))
    assert only.allows(somebody, "labs/x") and not only.allows(nobody, "labs/x")
    assert not AccessList((override("labs/*", seconds=-1),)).allows(somebody, "labs/x")
    drop_in = Principal(id="d", key_id="d", allow=(), is_drop_in=True)
    assert not AccessList((override("*"),)).allows(drop_in, "labs/x")


def test_all_of_a_prefix_is_reached_by_one_open_pattern_only() -> None:
    for allow, expected in (
        (("mock/*",), True),
        (("*",), True),
        (("mock/?",), False),
        (("mock/gpt*",), False),
        (("mock/a", "mock/b"), False),
    ):
        assert KEYS.allows_all(principal(*allow), "mock/") is expected, allow


names = st.text("ab/-", min_size=1, max_size=8)


@given(st.lists(st.text("ab/-*?", min_size=1, max_size=6), max_size=4), names)
def test_it_agrees_with_a_reference_written_another_way(patterns: list[str], model: str) -> None:
    assert KEYS.allows(principal(*patterns), model) is any(matches(pattern, model) for pattern in patterns)


def test_a_million_random_decisions_agree_with_the_reference() -> None:
    draw = random.Random(20)
    namespaces, parts = ("default", "labs", "Labs", "defaults", "mock"), ("a", "b", "ab", "a-b", "b/c", "é", "A")
    models = [f"{n}/{p}" for n in namespaces for p in parts] + ["a", "*", "default/*", "default/", "/a", ""]
    patterns = [
        *(f"{n}/{p}" for n in ("default", "labs", "mock", "*") for p in ("*", "a", "a*", "?", "[ab]", "*/c", "[!a]*")),
        "*",
        "de*",
        "Labs/*",
    ]
    granted = [override(draw.choice(patterns), key_id=draw.choice((None, "k1", "k2"))) for _ in range(3)]
    lists = [AccessList(tuple(draw.sample(granted, count))) for count in (0, 0, 1, 2, 3)]
    grants = [
        Grants(
            f"k{draw.randrange(4)}",
            tuple(draw.sample(patterns, draw.randrange(4))),
            tuple(draw.sample(patterns, draw.choice((0, 0, 1, 2)))),
        )
        for _ in range(300)
    ]
    keys = [principal(*grant.own, by_namespace=grant.by_namespace, key_id=grant.key_id) for grant in grants]
    cases = [(number, model, access) for number in range(300) for model in models for access in range(len(lists))]
    expected = {
        case: decide(grants[case[0]], case[1], [(o.agent, o.key_id) for o in lists[case[2]].overrides])
        for case in cases
    }
    seen = set()
    for number, model, access in draw.choices(cases, k=1_000_000):
        allowed = lists[access].allows(keys[number], model)
        wanted = expected[number, model, access]
        assert allowed is (wanted != "deny"), (grants[number], model, lists[access])
        seen.add(wanted)
    for number, model, access in cases:
        assert lists[access].decide(keys[number], model).source == expected[number, model, access]
    assert seen == {"override", "namespace_default", "api_key", "deny"}


async def _book() -> None:
    published: list[AccessList] = []
    changed = asyncio.Event()

    def publish(access: AccessList) -> None:
        published.append(access)
        changed.set()

    book = OverrideBook(publish)
    for wrong in (("", 5, "r"), ("é/*", 5, "r"), ("a/*", 0, "r"), ("a/*", LONGEST_S + 1, "r"), ("a/*", 5, " ")):
        with pytest.raises(InvalidRequest):
            book.make(*wrong)
    short, long = book.make("a/*", 1, "short"), book.make("b/*", 60, "long", key_id="k")
    book.apply(long)
    book.apply(short)
    book.apply(short)
    assert [o.agent for o in book.list_overrides()] == ["a/*", "b/*"]
    assert published[-1].allows(principal(), "a/x") and published[-1].allows(principal(), "b/x")
    changed.clear()
    async with asyncio.timeout(5):
        await changed.wait()
    assert [o.agent for o in published[-1].overrides] == ["b/*"], "the first has expired by itself"
    book.revoke(long.id)
    assert not published[-1].overrides
    with pytest.raises(NotFound):
        book.revoke(long.id)
    for _ in range(MOST):
        book.apply(book.make("c/*", 60, "many"))
    with pytest.raises(InvalidRequest):
        book.apply(book.make("c/*", 60, "one more"))
    book.close()


def test_the_book_grants_expires_and_revokes() -> None:
    asyncio.run(_book())
