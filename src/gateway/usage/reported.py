"""What an answer that is relayed as bytes says of its own usage: JSON, or the last event of a stream."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from gateway.events import Usage
from gateway.usage.prices import MOST_TOKENS, reported_cost

_KEPT = 16_384
"""Bytes at the end that are looked at: a picture before them is megabytes, and of no interest."""
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
_TYPES = (b"application/json", b"text/event-stream")
_Number = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]


class _Details(Struct):
    cached_tokens: _Number | None = None
    audio_tokens: _Number | None = None
    reasoning_tokens: _Number | None = None


class _Tokens(Struct):
    input_tokens: _Number | None = None
    output_tokens: _Number | None = None
    prompt_tokens: _Number | None = None
    completion_tokens: _Number | None = None
    input_tokens_details: _Details | None = None
    input_token_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cost: Any = None


class AnswerUsage:
    """Reads along; ``content_type`` is the answer's."""

    def __init__(self, content_type: bytes | None) -> None:
        self._reads = content_type is not None and content_type.partition(b";")[0].strip().lower() in _TYPES
        self._tail = b""

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the answer."""
        if self._reads:
            self._tail = (self._tail + piece)[-_KEPT:] if len(piece) < _KEPT else piece[-_KEPT:]

    def find(self) -> Usage | None:
        """Return the usage that the answer ends with; None where it says nothing of tokens."""
        found = list(_USAGE.finditer(self._tail))
        if not found:
            return None
        try:
            given, _ = json.JSONDecoder().raw_decode(self._tail[found[-1].end() :].decode("utf-8", "replace"))
            tokens = msgspec.convert(given, _Tokens)
        except (ValueError, RecursionError, msgspec.ValidationError):
            return None
        read = tokens.input_tokens if tokens.input_tokens is not None else tokens.prompt_tokens
        written = tokens.output_tokens if tokens.output_tokens is not None else tokens.completion_tokens
        if read is None and written is None:
            return None
        inputs = tokens.input_tokens_details or tokens.input_token_details or _Details()
        outputs = tokens.output_tokens_details or _Details()
        cost = None if tokens.cost is None else reported_cost(tokens.cost)
        return Usage(
            input_tokens=read or 0,
            output_tokens=written or 0,
            cached_input_tokens=inputs.cached_tokens or 0,
            reasoning_tokens=outputs.reasoning_tokens or 0,
            requests=1,
            audio_input_tokens=inputs.audio_tokens or 0,
            audio_output_tokens=outputs.audio_tokens or 0,
            cost=cost,
            cost_reported=cost is not None,
        )
