"""Answers that are relayed as bytes: held or passed on piece by piece, and judged for being finished answers.

JSON is held and judged whole, as far as it is small; of an event stream each event is judged before it goes out.
What is too large for that goes out as it comes, and only its end is judged. Anything else (audio, text, files) is
whole when the upstream's connection says so.
"""

from __future__ import annotations

import re
from typing import Protocol

import msgspec

from gateway.errors import UpstreamError, UpstreamIncomplete
from gateway.upstreams.failures import failure_of_object
from gateway.upstreams.judging import JsonJudge

HELD_BYTES = 4 * 1024 * 1024
"""A JSON answer up to this size is held until it is whole."""

_EVENT_BYTES = 64 * 1024
"""An event beyond this size is a picture or sound, not an error, and goes out while it comes."""

_SPEECH_PATH = "/audio/speech"
_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINES = re.compile(rb"\r\n|\n|\r")
_ENDING = re.compile(rb'"type"\s*:\s*"(image_generation|image_edit|transcript\.text|speech\.audio)\.([a-z_]{1,32})"')
_OVERLAP = 128


class ByteAnswer(Protocol):
    """Sees one answer piece by piece; raises a `GatewayError` for what is none."""

    def feed(self, piece: bytes) -> bytes:
        """Return what may go out now."""
        ...

    def end(self) -> bytes:
        """Judge the end, and return what was held up to now."""
        ...


def byte_answer(
    path: str, status: int, content_type: bytes, upstream: str, secrets: tuple[str, ...], lent_in: str | None = None
) -> ByteAnswer:
    """Return the judge of one answer of ``path``. A file's content is nobody's answer, and passes."""
    kind = content_type.partition(b";")[0].strip().lower()
    path = path.partition("?")[0]
    if status == 204 or path.endswith("/content"):
        return _Plain(upstream)
    if kind == b"application/json":
        return _Json(upstream, secrets, lent_in)
    if kind == b"text/event-stream":
        return _Events(upstream, secrets, lent_in)
    return _Plain(upstream, needed=path == _SPEECH_PATH)


class _Plain:
    """Bytes that mean nothing to the gateway; speech, though, is never silent to its last byte."""

    def __init__(self, upstream: str, *, needed: bool = False) -> None:
        self._upstream, self._needed = upstream, needed

    def feed(self, piece: bytes) -> bytes:
        self._needed = False
        return piece

    def end(self) -> bytes:
        if self._needed:
            raise _cut(self._upstream, "sent an empty answer")
        return b""


class _Json:
    def __init__(self, upstream: str, secrets: tuple[str, ...], lent_in: str | None) -> None:
        self._upstream, self._secrets, self._lent_in = upstream, secrets, lent_in
        self._held = bytearray()
        self._passes = False
        self._last = b""

    def feed(self, piece: bytes) -> bytes:
        if self._passes:
            self._last = (self._last + piece)[-_OVERLAP:]
            return piece
        self._held += piece
        if len(self._held) <= HELD_BYTES:
            return b""
        self._passes = True
        held, self._held = bytes(self._held), bytearray()
        self._last = held[-_OVERLAP:]
        return held

    def end(self) -> bytes:
        if not self._passes:
            held = bytes(self._held)
            JsonJudge(self._upstream, self._secrets, self._lent_in).body(held)
            return held
        if not self._last.rstrip().endswith(b"}"):
            raise _cut(self._upstream, "ended its answer before it was finished")
        return b""


class _Events:
    """Errors are raised instead of relayed; where the events are of official kinds, the last one must come."""

    def __init__(self, upstream: str, secrets: tuple[str, ...], lent_in: str | None) -> None:
        self._upstream, self._secrets, self._lent_in = upstream, secrets, lent_in
        self._held = b""
        self._tail = b""
        self._passes = False
        self._any = False
        self._is_open = False

    def feed(self, piece: bytes) -> bytes:
        self._watch(piece)
        if self._passes:
            # The rest of a large event; its end may stand across two pieces.
            seen = self._held + piece
            end = _END_OF_EVENT.search(seen)
            if end is None:
                self._held = piece[-3:]
                return piece
            skipped = end.end() - len(self._held)
            self._passes, self._held = False, b""
            return piece[:skipped] + self._cut(piece[skipped:])
        return self._cut(piece)

    def end(self) -> bytes:
        rest = b"" if self._passes else self._held
        if rest.strip():
            data = self._data_of(rest)
            if data and data != b"[DONE]":
                try:
                    msgspec.json.decode(data, type=msgspec.Raw)
                except msgspec.DecodeError as error:
                    raise _cut(self._upstream, "ended its stream in the middle of an event") from error
                self._judge(data)
        if self._passes or self._is_open or not self._any:
            raise _cut(self._upstream, "ended its stream before the answer was finished")
        return rest

    def _cut(self, piece: bytes) -> bytes:
        """Return the whole events; judge each of them."""
        held = self._held + piece
        start = 0
        for end in _END_OF_EVENT.finditer(held):
            self._judge(self._data_of(held[start : end.start()]))
            start = end.end()
        out, self._held = held[:start], held[start:]
        if len(self._held) > _EVENT_BYTES:
            self._any = self._passes = True
            out, self._held = held, held[-3:]
        return out

    def _data_of(self, event: bytes) -> bytes:
        lines = [line[5:].removeprefix(b" ") for line in _LINES.split(event) if line.startswith(b"data:")]
        return b"\n".join(lines)

    def _judge(self, data: bytes) -> None:
        if not data:
            return
        self._any = True
        if b'"error"' not in data:
            return
        try:
            event = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if not isinstance(event, dict):
            return
        error = event.get("error") or (event if event.get("type") == "error" else None)
        if error:
            raise failure_of_object(self._upstream, error, secrets=self._secrets, lent_in=self._lent_in)

    def _watch(self, piece: bytes) -> None:
        """Note whether events of an official kind have begun, and ended."""
        seen = self._tail + piece
        for found in _ENDING.finditer(seen):
            self._is_open = found.group(2) not in (b"done", b"completed")
        self._tail = seen[-_OVERLAP:]


def _cut(upstream: str, what: str) -> UpstreamError:
    return UpstreamIncomplete(f"The upstream '{upstream}' {what}. Send the request again.")
