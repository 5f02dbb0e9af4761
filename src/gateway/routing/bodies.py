"""Request bodies: what the operator says where the request does not, and what a target calls otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Raw

from gateway.model_settings import ModelSettings

MaxTokensField = Literal["max_tokens", "max_completion_tokens"]

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_OTHER: dict[MaxTokensField, MaxTokensField] = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
}
_SAME = {"max_tokens": ("max_tokens", "max_completion_tokens")}


def with_settings(fields: Mapping[str, Raw], settings: ModelSettings) -> dict[str, Raw]:
    """Return the fields of a body with the settings that it does not have; a limit of tokens counts by either name."""
    given = settings.given()
    unsaid = [name for name in given if not any(_says(fields, known) for known in _SAME.get(name, (name,)))]
    return {**fields, **{name: Raw(msgspec.json.encode(given[name])) for name in unsaid}}


def _says(fields: Mapping[str, Raw], name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def with_model(body: bytes, model: str) -> bytes:
    """Return the JSON object with another top-level ``model``; every other slice stays as it was written."""
    fields = _FIELDS.decode(body)
    fields["model"] = Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def with_max_tokens_as(body: bytes, name: MaxTokensField) -> bytes:
    """Return the JSON object with its limit of tokens under ``name`` alone; where both names stand, that one counts."""
    other = _OTHER[name]
    if other.encode() not in body:
        return body
    fields = _FIELDS.decode(body)
    limit = fields.pop(other, None)
    if limit is None:
        return body
    fields.setdefault(name, limit)
    return msgspec.json.encode(fields)
