"""Rewriting the model's name in a request body, and nothing else."""

from __future__ import annotations

import msgspec
from msgspec import Raw

_FIELDS = msgspec.json.Decoder(dict[str, Raw])


def with_model(body: bytes, model: str) -> bytes:
    """Return the JSON object with another top-level ``model``; every other slice stays as it was written."""
    fields = _FIELDS.decode(body)
    fields["model"] = Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
