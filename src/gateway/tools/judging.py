"""Argument rules: bounds on named arguments, judged at every call whatever the model says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.errors import ConfigError, ToolDenied
from gateway.tools.config import ArgumentRule
from gateway.tools.schemas import Pattern

_UP = re.compile(r"(^|[/\\])(\.|%2e){2}([/\\?#]|%2f|%5c|$)", re.IGNORECASE)
"""A step up in a path, however it is written."""

_BARE_HOST = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")


class ArgumentJudge:
    """The argument rules of one tool, compiled."""

    def __init__(self, rules: tuple[ArgumentRule, ...]) -> None:
        """Raise `ConfigError` for a rule that bounds nothing, or less than it seems to."""
        self._rules = [(rule, _compiled(rule)) for rule in rules]

    def judge(self, arguments: Mapping[str, Any]) -> None:
        """Return if every rule holds; else raise `ToolDenied` naming the argument and the rule, never the value."""
        for rule, pattern in self._rules:
            values = list(_values(arguments, rule.argument.split(".")))
            if not values and not rule.optional:
                raise _denied(rule, "must be given")
            for value in values:
                problem = _problem(value, rule, pattern)
                if problem is not None:
                    raise _denied(rule, problem)


def _values(node: Any, path: list[str]) -> Iterator[Any]:
    """Yield what stands at a path; lists on the way, and at its end, stand for each of their items."""
    if isinstance(node, list):
        for item in node:
            yield from _values(item, path)
    elif not path:
        yield node
    elif isinstance(node, dict) and path[0] in node:
        yield from _values(node[path[0]], path[1:])


def _problem(value: Any, rule: ArgumentRule, pattern: Pattern | None) -> str | None:
    if rule.enum is not None and not any(value == item and type(value) is type(item) for item in rule.enum):
        return f"must be one of {', '.join(map(str, rule.enum))[:200]}"
    if rule.prefix is not None:
        if not isinstance(value, str) or not value.startswith(rule.prefix):
            return f"must begin with {rule.prefix[:100]!r}"
        if _UP.search(value) or "\0" in value:
            return "must not lead upwards ('..')"
    if pattern is not None and not (isinstance(value, str) and pattern.search(value)):
        return "does not match the rule's expression"
    if rule.min is not None or rule.max is not None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        # Written so that NaN fails.
        if not (rule.min is None or value >= rule.min) or not (rule.max is None or value <= rule.max):
            low, high = ("…" if bound is None else f"{bound:g}" for bound in (rule.min, rule.max))
            return f"must lie between {low} and {high}"
    return None


def _denied(rule: ArgumentRule, problem: str) -> ToolDenied:
    return ToolDenied(f"The argument '{rule.argument}' {problem}: a rule of this tool.", param=rule.argument)


def _compiled(rule: ArgumentRule) -> Pattern | None:
    if (rule.prefix, rule.enum, rule.regex, rule.min, rule.max) == (None,) * 5:
        raise ConfigError(f"rules: '{rule.argument}': give it prefix, enum, regex, min or max.")
    if rule.prefix is not None and _BARE_HOST.fullmatch(rule.prefix):
        raise ConfigError(
            f"rules: '{rule.argument}': the prefix {rule.prefix!r} also begins other hosts' names; end it with '/'."
        )
    if rule.regex is None:
        return None
    try:
        return Pattern(f"^(?:{rule.regex})$" if not rule.regex.endswith("\\") else rule.regex)
    except ValueError as error:
        raise ConfigError(
            f"rules: '{rule.argument}': {error}: no look-around, no back-references; it matches the whole value."
        ) from error
