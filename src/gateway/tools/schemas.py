"""JSON Schemas of tools: compiled once, bounded against schemas and values that would never finish.

Schemas may come from strangers (an MCP server, an OpenAPI document), values from a model. So references stay inside
the schema, regular expressions run on an engine without backtracking, and one validation has a budget of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from pydantic_core import SchemaError, SchemaValidator, core_schema
from pydantic_core import ValidationError as Mismatch
from referencing import Registry
from referencing.exceptions import Unresolvable

from gateway.errors import ConfigError, InvalidToolArguments

LARGEST_SCHEMA = 128 * 1024
"""Bytes of one schema as JSON."""

_DEEPEST = 64
_STEPS = 20_000
"""Keywords that one validation may try: about a quarter of a second."""

_DEEPEST_NESTING = 96
"""Keywords inside keywords that one validation may follow."""

_OPEN = {
    *("additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties", "dependentSchemas"),
    *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef"),
}
"""Keywords with which a schema says itself what it thinks of names that it does not list."""


class _OutOfSteps(Exception):
    pass


class _OutOfBounds(Exception):
    """A value cannot be judged within bounds."""


class Pattern:
    """A regular expression in linear time: no look-around, no back-references."""

    def __init__(self, pattern: str) -> None:
        """Raise `ValueError` for what the engine does not know, or what would grow too large."""
        try:
            self._validator = SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
        except (SchemaError, ValueError, TypeError) as error:
            raise ValueError(f"the regular expression {pattern[:80]!r} cannot be used here") from error

    def search(self, text: str) -> bool:
        """Return whether the pattern matches anywhere in ``text``."""
        try:
            self._validator.validate_python(text)
        except Mismatch:
            return False
        return True


class _Bounded:
    """A schema whose validations end soon, whatever it and the value are."""

    def __init__(self, schema: dict[str, Any], *, foreign: bool) -> None:
        _check(schema)
        self._patterns: dict[str, Pattern] = {}
        self._left = self._depth = 0
        for pattern in _patterns_of(schema):
            try:
                self._patterns[pattern] = Pattern(pattern)
            except ValueError as error:
                if foreign:
                    continue
                raise ConfigError(f"schema: {error}: look-around and back-references are not known.") from error
        self._validator = self._class()(schema, registry=Registry())

    def _mismatch(self, value: Any) -> tuple[str, str] | None:
        """Return where a value does not fit, and how; None where it does. Raises `_OutOfBounds`."""
        self._left, self._depth = _STEPS, 0
        try:
            found = best_match(self._validator.iter_errors(value))
        except (_OutOfSteps, RecursionError, Unresolvable) as error:
            raise _OutOfBounds from error
        if found is None:
            return None
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found.absolute_path)
        return where[:200], _words(found)

    def _class(self) -> Any:
        own = {
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
            "uniqueItems": _unique_items,
            "multipleOf": _multiple_of,
        }
        rules = {**Draft202012Validator.VALIDATORS, **own}
        counted = {name: self._counted(rule) for name, rule in rules.items()}
        return extend(Draft202012Validator, counted)  # type: ignore[no-untyped-call]

    def _counted(self, rule: Any) -> Any:
        def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            self._left -= 1
            self._depth += 1
            # The depth is ours to bound: a RecursionError inside the library's Rust parts is no Python exception.
            if self._left < 0 or self._depth > _DEEPEST_NESTING:
                raise _OutOfSteps
            try:
                yield from rule(validator, value, instance, schema) or ()
            finally:
                self._depth -= 1

        return counted

    def _matches(self, pattern: str, text: str, *, unknown: bool) -> bool:
        known = self._patterns.get(pattern)
        return unknown if known is None else known.search(text)

    def _pattern(self, _: Any, pattern: str, instance: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not self._matches(pattern, instance, unknown=True):
            yield ValidationError(f"does not match {pattern[:100]!r}")

    def _pattern_properties(self, validator: Any, value: Any, instance: Any, _: Any) -> Iterator[ValidationError]:
        if isinstance(instance, dict):
            for pattern, subschema in value.items():
                for name, item in instance.items():
                    if self._matches(pattern, name, unknown=False):
                        yield from validator.descend(item, subschema, path=name, schema_path=pattern)

    def _additional_properties(self, validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if not isinstance(instance, dict):
            return
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, item in instance.items():
            if name in named or any(self._matches(pattern, name, unknown=True) for pattern in patterns):
                continue
            if value is False:
                yield ValidationError(f"has the unknown name {name[:64]!r}")
            else:
                yield from validator.descend(item, value, path=name)


class ArgumentSchema(_Bounded):
    """One tool's parameters, ready to judge arguments."""

    def __init__(self, parameters: Mapping[str, Any], *, foreign: bool = False) -> None:
        """Raise `ConfigError` for a schema that is none, or that asks for more than it may.

        In a ``foreign`` schema a regular expression that the engine does not know is left to the tool's own server.
        """
        schema = dict(parameters)
        kind = schema.get("type", "object")
        if kind != "object":
            raise ConfigError(f"schema: its type is {kind!r}; the arguments of a tool are an object.")
        super().__init__(schema, foreign=foreign)
        is_open = "properties" not in schema or not _OPEN.isdisjoint(schema)
        self._declared = None if is_open else frozenset(schema["properties"])

    def reduced(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments without those that the schema does not name, where it says nothing about others."""
        if self._declared is None:
            return dict(arguments)
        return {name: value for name, value in arguments.items() if name in self._declared}

    def validate(self, arguments: Mapping[str, Any]) -> None:
        """Return if the arguments fit; else raise `InvalidToolArguments`, which says where they do not."""
        try:
            found = self._mismatch(arguments)
        except _OutOfBounds as error:
            raise InvalidToolArguments(
                "The arguments cannot be checked against the tool's schema within bounds.", param="arguments"
            ) from error
        if found is not None:
            where = f"arguments{found[0]}"
            raise InvalidToolArguments(f"{where}: {found[1]}.", param=where)


class ResultSchema(_Bounded):
    """What a stranger's tool says of its results."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for a schema that is none, or that asks for more than it may."""
        super().__init__(dict(schema), foreign=True)

    def find_mismatch(self, value: Any) -> str | None:
        """Say how a result breaks its tool's word; None where it does not, or is too much to look at in full."""
        try:
            found = self._mismatch(value)
        except _OutOfBounds:
            return None
        return None if found is None else f"result{found[0]}: {found[1]}"


def _words(error: ValidationError) -> str:
    """Say what is wrong without the value, which may be long or nobody's business."""
    value: Any = error.validator_value
    instance: Any = error.instance
    match error.validator:
        case "required":
            missing = [name for name in value if name not in instance]
            return f"{', '.join(repr(name) for name in missing[:10])} is missing"
        case "type":
            kinds = value if isinstance(value, str) else " or ".join(map(str, value))
            return f"must be of type {kinds}"
        case "enum" | "const":
            return f"must be one of {str(value)[:200]}" if error.validator == "enum" else f"must be {str(value)[:200]}"
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" | "format":
            return f"does not keep to {error.validator} {str(value)[:64]}"
        case "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties" | "maxProperties":
            return f"does not keep to {error.validator} {str(value)[:64]}"
        case "pattern" | "additionalProperties" if value is not True:
            return error.message[:200]
    return f"does not keep to the schema's {error.validator}"


def _unique_items(_: Any, wanted: Any, instance: Any, __: Any) -> Iterator[ValidationError]:
    """In one pass; the library's own takes the square of the length."""
    if wanted and isinstance(instance, list):
        texts = {msgspec.json.encode(item, order="deterministic") for item in instance}
        if len(texts) != len(instance):
            yield ValidationError("has items that are alike")


def _multiple_of(_: Any, factor: Any, instance: Any, __: Any) -> Iterator[ValidationError]:
    """Without the library's overflow for huge floats."""
    if isinstance(instance, int | float) and not isinstance(instance, bool):
        quotient = instance / factor if abs(instance) < 1e300 else math.inf
        if not math.isfinite(quotient) or abs(quotient - round(quotient)) > 1e-9:
            yield ValidationError(f"is no multiple of {factor}")


def _check(schema: dict[str, Any]) -> None:
    try:
        size = len(msgspec.json.encode(schema))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ConfigError("schema: it is no JSON value.") from error
    if size > LARGEST_SCHEMA:
        raise ConfigError(f"schema: it has {size:,} bytes; {LARGEST_SCHEMA:,} are the most.")
    for node, depth in _nodes(schema):
        if depth > _DEEPEST:
            raise ConfigError(f"schema: it is more than {_DEEPEST} levels deep.")
        for key in ("$ref", "$dynamicRef"):
            if isinstance(node.get(key), str) and not node[key].startswith("#"):
                raise ConfigError(f"schema: {key} {node[key][:80]!r} leads out of the schema; only '#/…' is followed.")
        if isinstance(node.get("$id"), str):
            raise ConfigError("schema: $id changes what references mean; leave it out.")
        if isinstance(node.get("patternProperties"), dict) and "unevaluatedProperties" in node:
            raise ConfigError("schema: patternProperties beside unevaluatedProperties is not supported.")
    try:
        problem = best_match(_META.iter_errors(schema))
    except RecursionError as error:
        raise ConfigError("schema: it refers to itself without end.") from error
    if problem is not None:
        where = "/".join(str(part) for part in problem.absolute_path)
        raise ConfigError(f"schema: {where or 'it'}: no JSON Schema ({problem.message[:160]}).")


_META = Draft202012Validator(Draft202012Validator.META_SCHEMA)


def _nodes(schema: Any) -> Iterator[tuple[dict[str, Any], int]]:
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, dict):
            yield node, depth
            waiting.extend((item, depth + 1) for item in node.values())
        elif isinstance(node, list):
            waiting.extend((item, depth + 1) for item in node)


def _patterns_of(schema: dict[str, Any]) -> Iterator[str]:
    for node, _ in _nodes(schema):
        if isinstance(node.get("pattern"), str):
            yield node["pattern"]
        if isinstance(node.get("patternProperties"), dict):
            yield from node["patternProperties"]
