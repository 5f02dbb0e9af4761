"""The access rules once more, as short as they can be written and sharing nothing with the product's own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple


class Grants(NamedTuple):
    key_id: str
    own: tuple[str, ...]
    by_namespace: tuple[str, ...]


@cache
def matches(pattern: str, text: str) -> bool:
    if not text.isascii():
        return False
    if not pattern:
        return not text
    head, rest = pattern[0], pattern[1:]
    if head == "*":
        return any(matches(rest, text[cut:]) for cut in range(len(text) + 1))
    end = rest.find("]", 2 if rest.startswith("!") else 1)
    if head == "[" and end > 0:
        inside = rest[:end]
        wanted = inside[0] != "!"
        return text[:1] != "" and (text[0] in inside.lstrip("!")) is wanted and matches(rest[end + 1 :], text[1:])
    return text[:1] != "" and head in ("?", text[0]) and matches(rest, text[1:])


def decide(grants: Grants, model: str, overrides: Iterable[tuple[str, str | None]] = ()) -> str:
    if any(matches(pattern, model) for pattern, key_id in overrides if key_id in (None, grants.key_id)):
        return "override"
    if any(matches(pattern, model) for pattern in grants.by_namespace):
        return "namespace_default"
    return "api_key" if any(matches(pattern, model) for pattern in grants.own) else "deny"
