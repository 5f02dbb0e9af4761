"""What an answer says of its own usage; one that is relayed as bytes: JSON, its last event, subtitles, text."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.events import Usage
from gateway.usage.measures import Measured
from gateway.usage.prices import MOST_TOKENS, reported_cost

_KEPT = 16_384
"""Bytes at the end that are looked at: a picture before them is megabytes, and of no interest."""
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
_PICTURE = re.compile(rb'(?<!\\)"(?:b64_json|url)"\s*:\s*"')
_LAST_PICTURE = re.compile(rb'(?<!\\)"type"\s*:\s*"image_(?:generation|edit)\.completed"')
_LONGEST_MATCH = 64
_TIME = re.compile(rb"--> *(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})[.,](\d{3})")
_JSON, _EVENTS = b"application/json", b"text/event-stream"
_MOST_SECONDS = 10**7
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
    seconds: Any = None
    cost: Any = None


class _Whole(Struct):
    """What a whole JSON answer may say, of whatever shape."""

    usage: Any = None
    duration: Any = None
    text: Any = None
    size: Any = None
    quality: Any = None
    data: Raw = Raw(b"null")


def with_thoughts(read: int, written: int, total: int, thought: int, cached: int) -> tuple[int, int]:
    """Return the tokens of an answer, and those of them that are thoughts, for an upstream that counts thoughts apart.

    OpenAI's ``completion_tokens`` hold them. xAI's do not, and Gemini's neither, which shows them in the total alone.
    The rest of a total is taken for thoughts only where nothing else can be it: no ``cached`` tokens, read or written.
    """
    rest = total - read - written
    if rest > 0 and (rest == thought or not (thought or cached)):
        return written + rest, rest
    return written, thought


class AnswerUsage:
    """Reads along; ``content_type`` is the answer's. A JSON answer that comes in one piece is read as a whole."""

    def __init__(self, content_type: bytes | None) -> None:
        self.kind = b"" if content_type is None else content_type.partition(b";")[0].strip().lower()
        self._tail = b""
        self._pictures = 0
        self._last_pictures = 0
        self._overlap = b""
        self._pieces = 0
        self._size = 0
        self._whole: _Whole | None = None

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON."""
        return self.kind == _JSON

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the answer."""
        self._pieces += 1
        self._size += len(piece)
        if self.kind not in (_JSON, _EVENTS) and not self.kind.startswith(b"text/"):
            return
        if self.kind == _JSON and self._pieces == 1:
            try:
                self._whole = msgspec.json.decode(piece, type=_Whole)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self._whole = None
        elif self._whole is not None:
            self._whole = None
        if self._whole is None and not self.kind.startswith(b"text/p"):
            seen = self._overlap + piece
            new = len(self._overlap)
            self._pictures += sum(found.end() > new for found in _PICTURE.finditer(seen))
            self._last_pictures += sum(found.end() > new for found in _LAST_PICTURE.finditer(seen))
            self._overlap = seen[-_LONGEST_MATCH:]
        self._tail = (self._tail + piece)[-_KEPT:] if len(piece) < _KEPT else piece[-_KEPT:]

    def find(self) -> Usage | None:
        """Return the usage that the answer ends with; None where it says nothing of tokens."""
        tokens = self._tokens()
        if tokens is None:
            return None
        read = tokens.input_tokens if tokens.input_tokens is not None else tokens.prompt_tokens
        written = tokens.output_tokens if tokens.output_tokens is not None else tokens.completion_tokens
        cost = None if tokens.cost is None else reported_cost(tokens.cost)
        if read is None and written is None and cost is None:
            return None
        inputs = tokens.input_tokens_details or tokens.input_token_details or _Details()
        outputs = tokens.output_tokens_details or _Details()
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

    def measured(self) -> Measured:
        """Return what the answer says of pictures and of the length of sound."""
        whole, tokens = self._whole, self._tokens()
        milliseconds = _milliseconds(tokens.seconds) if tokens is not None else 0
        if whole is None:
            pictures = self._last_pictures if self.kind == _EVENTS else self._pictures
            return Measured(pictures, milliseconds=milliseconds or self._last_time())
        return Measured(
            _length(whole.data),
            _text(whole.size),
            _text(whole.quality),
            milliseconds=milliseconds or _milliseconds(whole.duration),
        )

    def written_characters(self) -> int:
        """Return how long the text is that the answer is."""
        if self._whole is not None and isinstance(self._whole.text, str):
            return len(self._whole.text)
        return self._size if self.kind.startswith(b"text/") and self.kind != _EVENTS else 0

    def _tokens(self) -> _Tokens | None:
        if self._whole is not None:
            given = self._whole.usage
        else:
            found = list(_USAGE.finditer(self._tail)) if self.kind in (_JSON, _EVENTS) else []
            if not found:
                return None
            try:
                given, _ = json.JSONDecoder().raw_decode(self._tail[found[-1].end() :].decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                return None
        try:
            return msgspec.convert(given, _Tokens)
        except msgspec.ValidationError:
            return None

    def _last_time(self) -> int:
        """Return where the last subtitle ends."""
        found = list(_TIME.finditer(self._tail)) if self.kind.startswith(b"text/") else []
        if not found:
            return 0
        hours, minutes, seconds, thousandths = (int(part or 0) for part in found[-1].groups())
        return ((hours * 60 + minutes) * 60 + seconds) * 1000 + thousandths


def _milliseconds(value: Any) -> int:
    try:
        seconds = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return 0
    return round(seconds * 1000) if math.isfinite(seconds) and 0 < seconds <= _MOST_SECONDS else 0


def _length(data: Raw) -> int:
    try:
        return len(msgspec.json.decode(data, type=list[Raw]))
    except msgspec.DecodeError:
        return 0


def _text(value: Any) -> str | None:
    return value[:32] if isinstance(value, str) and value else None
