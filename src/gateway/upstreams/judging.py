"""Whether an upstream's answer is a finished answer: the one place where a cut or empty one stops being a success.

The chunks of a chat stream differ in their ``choices`` alone. What stands before those is read once (`Frame`); of a
chunk that begins with the same bytes only the choices are read, provided that nothing but them is left of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct

from gateway.chat import CHAT_PATH, COMPLETIONS_PATH, EMBEDDINGS_PATH
from gateway.chunks import Choice, Chunk, Frame
from gateway.errors import GatewayError, UpstreamIncomplete, UpstreamMalformed
from gateway.upstreams.failures import failure_of_object

RESPONSES_PATH = "/responses"


class Judge(Protocol):
    """Sees one answer, whole or event by event, and raises a `GatewayError` for what cannot be passed on."""

    def body(self, data: bytes) -> None:
        """Judge a whole answer."""
        ...

    def event(self, data: bytes) -> Chunk:
        """Judge the next event of a stream; return what was read of it."""
        ...

    def end(self) -> None:
        """Judge the end of a stream."""
        ...


def judge_for(path: str, upstream: str, secrets: tuple[str, ...], lent_in: str | None = None) -> Judge:
    """Return a fresh judge for one answer of ``path``; paths without rules of their own must be JSON, and no error.

    ``secrets`` and ``lent_in`` are for `gateway.upstreams.failures`.
    """
    return _JUDGES.get(path.partition("?")[0], JsonJudge)(upstream, secrets, lent_in)


class JsonJudge:
    """Valid JSON objects without an ``error``."""

    def __init__(self, upstream: str, secrets: tuple[str, ...], lent_in: str | None = None) -> None:
        self._upstream = upstream
        self._secrets = secrets
        self._lent_in = lent_in

    def body(self, data: bytes) -> None:
        """Judge a whole answer."""
        answer = self._decode(_ANSWER, data)
        if _is_error(answer.error):
            raise self._said(answer.error)

    def event(self, data: bytes) -> Chunk:
        """Judge the next event."""
        self.body(data)
        return Chunk(data)

    def end(self) -> None:
        """Judge the end."""
        return None

    def _decode(self, decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
        try:
            if not data.isascii():
                data.decode()
            return decoder.decode(data)
        except UnicodeDecodeError as error:
            raise self._malformed("is not valid UTF-8") from error
        except msgspec.ValidationError as error:
            raise self._malformed("does not have the shape of this API") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._malformed("is not valid JSON") from error

    def _malformed(self, what: str) -> UpstreamMalformed:
        return UpstreamMalformed(
            f"The upstream '{self._upstream}' sent something that {what}. See whether its base_url is right."
        )

    def _cut(self, what: str) -> UpstreamIncomplete:
        return UpstreamIncomplete(f"The upstream '{self._upstream}' {what}. Send the request again.")

    def _said(self, error: Raw) -> GatewayError:
        try:
            said = msgspec.json.decode(error)
        except (msgspec.DecodeError, RecursionError):
            said = None  # numbers beyond every float, or depth: that it failed is clear all the same
        return failure_of_object(self._upstream, said, secrets=self._secrets, lent_in=self._lent_in)


class ChatJudge(JsonJudge):
    """Chat Completions: every choice that began must end with a ``finish_reason``."""

    whole = "a chat completion"
    part = "message"

    def __init__(self, upstream: str, secrets: tuple[str, ...], lent_in: str | None = None) -> None:
        super().__init__(upstream, secrets, lent_in)
        self._open: set[int] = set()
        self._finished: set[int] = set()
        self._frame: Frame | None = None

    def body(self, data: bytes) -> None:
        """Judge a whole answer."""
        answer = self._decode(_CHAT, data)
        if _is_error(answer.error):
            raise self._said(answer.error)
        if answer.choices is None:
            raise self._malformed(f"is not {self.whole} (it has no 'choices')")
        if not answer.choices:
            raise self._cut("sent an answer without any choice")
        for choice in answer.choices:
            if bytes(getattr(choice, self.part)) == b"null":
                raise self._malformed(f"is not {self.whole} (a choice has no '{self.part}')")
            if not choice.finish_reason:
                raise self._cut("sent an answer without a finish_reason, so it may be cut")

    def event(self, data: bytes) -> Chunk:
        """Judge the next event."""
        chunk = self._framed(data)
        if chunk is not None:
            self._note(chunk.choices)
            return chunk
        whole = self._decode(_CHUNK, data)
        if _is_error(whole.error):
            raise self._said(whole.error)
        if whole.choices:
            self._note(whole.choices)
            if self._frame is None or not data.startswith(self._frame.head):
                self._frame = _frame_of(data)
        return Chunk(data)

    def _framed(self, data: bytes) -> Chunk | None:
        """Return the chunk if it is the present frame with other choices in it."""
        frame = self._frame
        if frame is None or not data.startswith(frame.head):
            return None
        end, padding = data.rfind(b"]") + 1, b""
        if end != len(data) - 1 or not data.endswith(b"}"):
            tail = _TAIL.fullmatch(data, end)
            if tail is None:
                return None
            padding = tail[1] or b""
        try:
            if not data.isascii():
                data.decode()
            # One list and nothing after it: further keys would make this invalid.
            choices = _CHOICES.decode(data[len(frame.head) : end])
        except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
            return None
        return Chunk(data, frame, choices, end, padding) if choices else None

    def _note(self, choices: Sequence[Choice | _ChunkChoice]) -> None:
        for choice in choices:
            if choice.finish_reason:
                self._finished.add(choice.index)
                self._open.discard(choice.index)
            elif choice.index not in self._finished:
                self._open.add(choice.index)

    def end(self) -> None:
        """Judge the end."""
        if not self._finished:
            raise self._cut(
                "ended its stream before the answer was finished"
                if self._open
                else "ended its stream without an answer"
            )
        if self._open:
            raise self._cut("ended its stream before every choice was finished")


class CompletionsJudge(ChatJudge):
    """Legacy completions: as chat, with a ``text`` in each choice."""

    whole = "a completion"
    part = "text"


class EmbeddingsJudge(JsonJudge):
    """Embeddings: a list, though it may be empty."""

    def body(self, data: bytes) -> None:
        """Judge a whole answer."""
        answer = self._decode(_EMBEDDINGS, data)
        if _is_error(answer.error):
            raise self._said(answer.error)
        if answer.data is None:
            raise self._malformed("is not a list of embeddings (it has no 'data')")


class ResponsesJudge(JsonJudge):
    """Responses: the last word is ``response.completed``, ``response.incomplete`` or a failure."""

    def __init__(self, upstream: str, secrets: tuple[str, ...], lent_in: str | None = None) -> None:
        super().__init__(upstream, secrets, lent_in)
        self._done = False

    def body(self, data: bytes) -> None:
        """Judge a whole answer."""
        answer = self._decode(_RESPONSE, data)
        if _is_error(answer.error) or answer.status == "failed":
            raise self._said(answer.error)
        if answer.output is None:
            raise self._malformed("is not a response (it has no 'output')")
        if answer.status == "cancelled":
            raise self._cut("cancelled its answer")

    def event(self, data: bytes) -> Chunk:
        """Judge the next event."""
        event = self._decode(_RESPONSE_EVENT, data)
        if event.type in ("response.completed", "response.incomplete"):
            self._done = True
        elif event.type == "response.failed":
            raise self._said(event.response.error if event.response is not None else _NULL)
        elif event.type == "error":
            raise self._said(event.error if _is_error(event.error) else Raw(data))
        elif not event.type and _is_error(event.error):
            raise self._said(event.error)
        return Chunk(data)

    def end(self) -> None:
        """Judge the end."""
        if not self._done:
            raise self._cut("ended its stream before the answer was finished")


_NULL = Raw(b"null")
_BEFORE_CHOICES = b'"choices":'
_TAIL = re.compile(rb'(?:, ?"usage": ?null)?(, ?"obfuscation": ?"[0-9A-Za-z+/=_-]*")?}')
_UNFRAMED = frozenset({"error", "usage", "obfuscation"})


_JUDGES: dict[str, type[JsonJudge]] = {
    CHAT_PATH: ChatJudge,
    COMPLETIONS_PATH: CompletionsJudge,
    EMBEDDINGS_PATH: EmbeddingsJudge,
    RESPONSES_PATH: ResponsesJudge,
}


class _Answer(Struct):
    error: Raw = _NULL


class _Choice(Struct):
    finish_reason: str | None = None
    message: Raw = _NULL
    text: Raw = _NULL


class _Chat(Struct):
    choices: list[_Choice] | None = None
    error: Raw = _NULL


class _Embeddings(Struct):
    data: list[Raw] | None = None
    error: Raw = _NULL


class _ChunkChoice(Struct):
    index: int = 0
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_ChunkChoice] | None = None
    error: Raw = _NULL


class _Response(Struct):
    status: str | None = None
    output: list[Raw] | None = None
    error: Raw = _NULL


class _ResponseEvent(Struct):
    type: str | None = None
    response: _Response | None = None
    error: Raw = _NULL


_ANSWER = msgspec.json.Decoder(_Answer)
_CHAT = msgspec.json.Decoder(_Chat)
_EMBEDDINGS = msgspec.json.Decoder(_Embeddings)
_CHUNK = msgspec.json.Decoder(_Chunk)
_CHOICES = msgspec.json.Decoder(list[Choice])
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_RESPONSE = msgspec.json.Decoder(_Response)
_RESPONSE_EVENT = msgspec.json.Decoder(_ResponseEvent)


def _is_error(error: Raw) -> bool:
    """Clients take any truthy ``error`` for one, so the same goes here."""
    return error is not _NULL and bytes(error) not in (b"null", b"false", b"{}", b'""', b"0", b"[]")


def _frame_of(data: bytes) -> Frame | None:
    """Return what stands before the choices of a judged chunk; None where other keys must be looked at each time."""
    at = data.find(_BEFORE_CHOICES)
    if at < 0:
        return None
    head = data[: at + len(_BEFORE_CHOICES)]
    try:
        # Valid with a value and the end after it: then it is neither in a string nor in an inner object.
        fields = _FIELDS.decode(head + b"null}")
    except msgspec.DecodeError:
        return None
    del fields["choices"]
    return Frame(head, fields) if _UNFRAMED.isdisjoint(fields) else None
