"""Rewriting what a target calls otherwise in a request body: the model, and the limit of the answer's tokens."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Raw

MaxTokensField = Literal["max_tokens", "max_completion_tokens"]

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_OTHER: dict[MaxTokensField, MaxTokensField] = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
}


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
