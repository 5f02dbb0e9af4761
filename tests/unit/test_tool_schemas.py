"""Arguments against schemas and rules: complete, and bounded whatever a stranger wrote."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.errors import ConfigError, InvalidToolArguments, ToolDenied
from gateway.tools.config import ArgumentRule
from gateway.tools.judging import ArgumentJudge
from gateway.tools.schemas import ArgumentSchema


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("parameters", "arguments", "words"),
    [
        (schema(n={"type": "integer"}), {"n": True}, "arguments.n: must be of type integer"),
        ({**schema(n={}), "required": ["n", "m"]}, {}, "'n', 'm' is missing"),
        (schema(n={"enum": ["a", "b"]}), {"n": "c"}, "must be one of"),
        (schema(n={"minimum": 3}), {"n": 2}, "minimum 3"),
        (schema(n={"items": {"type": "string"}}), {"n": ["a", 1]}, "arguments.n[1]"),
        ({**schema(n={}), "additionalProperties": False}, {"x": 1}, "unknown name 'x'"),
        (schema(n={"anyOf": [{"type": "string"}, {"type": "null"}]}), {"n": 1}, "anyOf"),
        ({**schema(n={"$ref": "#/$defs/a"}), "$defs": {"a": {"type": "string"}}}, {"n": 1}, "of type string"),
        (schema(n={"multipleOf": 5}), {"n": 7}, "multipleOf"),
        (schema(n={"uniqueItems": True}), {"n": [{"a": 1}, {"a": 1}]}, "uniqueItems"),
        ({"type": "object", "patternProperties": {"^x": {"type": "string"}}}, {"x1": 1}, "arguments.x1"),
        (schema(n={"not": {"type": "string"}}), {"n": "x"}, "not"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_say_where(parameters: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidToolArguments) as caught:
        ArgumentSchema(parameters).validate(arguments)
    assert words in caught.value.message


def test_a_value_is_never_repeated() -> None:
    with pytest.raises(InvalidToolArguments) as caught:
        ArgumentSchema(schema(n={"type": "integer", "maximum": 1})).validate({"n": "sk-secret-value"})
    assert "sk-secret-value" not in caught.value.message


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "string"}, "'string'"),
        (schema(n={"type": "strin"}), "properties/n/type"),
        (schema(n={"$ref": "http://127.0.0.1/schema"}), "leads out of the schema"),
        (schema(n={"$ref": "file:///etc/passwd"}), "leads out of the schema"),
        (schema(n={"$id": "http://x/"}), "$id"),
        (schema(n={"pattern": "(?=x)"}), "regular expression"),
        (schema(n={"pattern": "(a{1000}){1000}"}), "regular expression"),
        (schema(n={"description": "x" * 200_000}), "bytes"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ArgumentSchema(parameters)
    assert words in caught.value.message


def test_a_deep_schema_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"not": deep}
    with pytest.raises(ConfigError):
        ArgumentSchema(schema(n=deep))


BUSH: dict[str, Any] = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {}}


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"type": "object", "$defs": BUSH, "$ref": "#/$defs/d0"}, {}),
        ({"type": "object", "$ref": "#"}, {}),
        (schema(n={"$ref": "#/$defs/nowhere"}), {"n": 1}),
        (schema(n={"type": "string", "pattern": "^(a+)+$"}), {"n": "a" * 50_000 + "!"}),
        (schema(n={"uniqueItems": True}), {"n": [{} for _ in range(50_000)]}),
    ],
)
def test_a_hostile_schema_or_value_ends_soon(parameters: dict[str, Any], arguments: dict[str, Any]) -> None:
    compiled = ArgumentSchema(parameters)
    started = time.thread_time()
    with pytest.raises(InvalidToolArguments):
        compiled.validate(arguments)
    assert time.thread_time() - started < 2


def test_undeclared_names_are_dropped_where_the_schema_says_nothing_of_them() -> None:
    given = {"n": 1, "token": "x"}
    assert ArgumentSchema(schema(n={})).reduced(given) == {"n": 1}
    assert ArgumentSchema({"type": "object"}).reduced(given) == given
    assert ArgumentSchema({**schema(n={}), "additionalProperties": True}).reduced(given) == given


def test_a_foreign_expression_is_left_to_its_server() -> None:
    ArgumentSchema(schema(n={"pattern": "(?=x)"}), foreign=True).validate({"n": "anything"})


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/etc"}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/data/../etc"}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/data/%2E%2e/etc"}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/data/.."}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/data/a\\..\\b"}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/data/x\0.png"}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": {"a": "/data/"}}),
        (ArgumentRule(argument="p", prefix="/data/"), {"p": ["/data/a", "/etc"]}),
        (ArgumentRule(argument="p", prefix="/data/"), {}),
        (ArgumentRule(argument="f.owner", enum=("me",)), {"f": [{"owner": "me"}, {"owner": "you"}]}),
        (ArgumentRule(argument="n", enum=(1,)), {"n": True}),
        (ArgumentRule(argument="n", max=10), {"n": 11}),
        (ArgumentRule(argument="n", min=0), {"n": float("nan")}),
        (ArgumentRule(argument="n", min=0), {"n": "5"}),
        (ArgumentRule(argument="n", max=10), {"n": True}),
        (ArgumentRule(argument="n", regex="[a-z]+"), {"n": "abc1"}),
        (ArgumentRule(argument="n", regex="a|b"), {"n": "ax"}),
        (ArgumentRule(argument="n", regex="[a-z]+"), {"n": "abc\nrm"}),
    ],
)
def test_a_rule_refuses(rule: ArgumentRule, arguments: dict[str, Any]) -> None:
    with pytest.raises(ToolDenied):
        ArgumentJudge((rule,)).judge(arguments)


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (ArgumentRule(argument="p", prefix="/data/"), {"p": "/data/a..b/c"}),
        (ArgumentRule(argument="p", prefix="/data/", optional=True), {}),
        (ArgumentRule(argument="f.owner", enum=("me",)), {"f": {"owner": "me"}}),
        (ArgumentRule(argument="n", min=0, max=10), {"n": 10}),
        (ArgumentRule(argument="n", regex="[a-z]+"), {"n": "abc"}),
    ],
)
def test_a_rule_lets_pass(rule: ArgumentRule, arguments: dict[str, Any]) -> None:
    ArgumentJudge((rule,)).judge(arguments)


@pytest.mark.parametrize(
    "rule",
    [
        ArgumentRule(argument="p"),
        ArgumentRule(argument="p", prefix="https://api.example.com"),
        ArgumentRule(argument="p", regex="(?!x)"),
    ],
)
def test_a_rule_that_bounds_less_than_it_seems_is_refused(rule: ArgumentRule) -> None:
    with pytest.raises(ConfigError):
        ArgumentJudge((rule,))
