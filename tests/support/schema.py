"""The official OpenAI schema as assertions: every body and every stream chunk must be what the document says."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

DOCUMENT = Path(__file__).parents[1] / "fixtures" / "openai" / "reduced.json"


def assert_completion(body: Any) -> None:
    """Assert a ``chat.completion``."""
    _assert_valid("CreateChatCompletionResponse", body)


def assert_chunk(body: Any) -> None:
    """Assert a ``chat.completion.chunk``."""
    _assert_valid("CreateChatCompletionStreamResponse", body)


def assert_error(body: Any) -> None:
    """Assert an error body: exactly one ``error`` object with all four keys."""
    _assert_valid("ErrorResponse", body)
    assert set(body) == {"error"}, f"more than an error object: {sorted(body)}"
    assert set(body["error"]) == {"message", "type", "param", "code"}, sorted(body["error"])
    assert body["error"]["message"].strip(), "an error without a message"


def assert_model(body: Any) -> None:
    """Assert one ``model`` object."""
    _assert_valid("Model", body)


def assert_models(body: Any) -> None:
    """Assert the list of models."""
    _assert_valid("ListModelsResponse", body)


def _assert_valid(name: str, body: Any) -> None:
    errors = [f"{error.json_path}: {error.message}" for error in _validator(name).iter_errors(body)]
    assert not errors, f"not a {name}: {errors[:5]} in {json.dumps(body)[:2000]}"


@cache
def _validator(name: str) -> Draft202012Validator:
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    return Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"})
