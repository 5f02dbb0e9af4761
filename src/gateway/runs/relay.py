"""Relay: the executor of a raw upstream model; what the client sent goes out, what the upstream says comes back.

The upstream's body is rebuilt from the top-level slices that were judged, with the upstream's own model name; unknown
request fields pass. Answers are never re-modelled: they are cut at the top level only, to put the gateway's model id
in and keys that no client knows out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.chat import STREAMED_PATHS, RelayRequest, decode_value
from gateway.chunks import Choice, Chunk, Frame
from gateway.errors import GatewayError, UpstreamMalformed
from gateway.events import RelayedBody, RelayedChunk, RelayedHead, RelayEnded, Routed, RunEvent, Usage
from gateway.observability.traces import OUTPUT_MESSAGES, current_span
from gateway.routing.routed import RoutedUpstream
from gateway.routing.targets import Binding, Target
from gateway.run import DirectExecutor, Outlet, RelayedAnswer, Run
from gateway.upstreams.relaying import OnHead, shown_headers
from gateway.usage.estimate import estimate_usage
from gateway.usage.meter import Meter
from gateway.usage.prices import MOST_TOKENS, reported_cost
from gateway.usage.reported import with_thoughts

CHUNK_KEYS = frozenset(
    {
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "service_tier",
        "system_fingerprint",
        "obfuscation",
        "moderation",
    }
)
"""Official top-level keys of a chat completion chunk."""


class RelayExecutor(DirectExecutor):
    """Relays one JSON request (chat, completions, embeddings) to one upstream model.

    ``passthrough_keys`` are further top-level chunk keys that reach the client; default: those of the upstream.
    """

    def __init__(
        self, binding: Binding, passthrough_keys: Iterable[str] | None = None, *, meter: Meter | None = None
    ) -> None:
        self._binding = binding
        self._meter = meter or Meter()
        self._passthrough_keys = passthrough_keys

    @property
    def _keys(self) -> frozenset[str]:
        given = self._passthrough_keys
        return CHUNK_KEYS.union(self._binding.upstream.config.passthrough_keys if given is None else given) - {"error"}

    def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """Yield `Routed`, `RelayedHead`, then chunks and `RelayEnded`, or one `RelayedBody`."""
        return self._stream(run) if run.streamed else self._whole(run)

    async def answer(self, run: Run) -> RelayedAnswer:
        """See `DirectExecutor.answer`."""
        request, upstream, heads = _relay_request(run), self._binding.upstream, list[RelayedHead]()
        body = self._body(request, streamed=False)
        try:
            data = await upstream.post(request.path, body, request_id=run.request_id, on_head=_keep_in(heads))
            answer = self._relayed_body(data, run, request, len(body))
        except GatewayError as error:
            error.is_relayed = True
            raise
        return RelayedAnswer(_decision(upstream), heads[-1] if heads else RelayedHead(), answer)

    async def pipe(self, run: Run, outlet: Outlet, began: Callable[[], None]) -> RelayEnded:
        """See `DirectExecutor.pipe`: what arrives together is judged, cut and sent together, without waking a task."""
        request, upstream, heads = _relay_request(run), self._binding.upstream, list[RelayedHead]()
        body = self._body(request, streamed=True)
        cutter = _ChunkCutter(run.model, upstream.name, self._keys, request.include_usage)

        def take(chunks: list[Chunk]) -> bool:
            cut = [data for chunk in chunks if (data := cutter.cut(chunk)) is not None]
            return outlet.push(cut) if cut else True

        try:
            started = await upstream.start(request.path, body, request_id=run.request_id, on_head=_keep_in(heads))
            async with started as stream:
                outlet.begin(_decision(upstream), heads[-1] if heads else RelayedHead())
                outlet.on_ready = stream.release
                began()
                take(stream.first)
                await stream.pipe(take)
        except GatewayError as error:
            error.is_relayed = True
            raise
        finally:
            outlet.on_ready = None
            usage = self._usage_of(run, request, cutter, len(body))
        last = cutter.usage_chunk()
        if last is not None:
            outlet.push([last])
        return RelayEnded(cutter.finish_reason, usage)

    async def _whole(self, run: Run) -> AsyncGenerator[RunEvent, None]:
        answer = await self.answer(run)
        if answer.routed is not None:
            yield answer.routed
        yield answer.head
        yield answer.body

    async def _stream(self, run: Run) -> AsyncGenerator[RunEvent, None]:
        request, upstream, heads = _relay_request(run), self._binding.upstream, list[RelayedHead]()
        cutter = _ChunkCutter(run.model, upstream.name, self._keys, request.include_usage)
        body = self._body(request, streamed=True)
        try:
            started = await upstream.start(request.path, body, request_id=run.request_id, on_head=_keep_in(heads))
            async with started as stream:
                chunks = stream.first
                while chunks:
                    for chunk in chunks:
                        data = cutter.cut(chunk)
                        if data is None:
                            continue
                        if heads:
                            if (routed := _decision(upstream)) is not None:
                                yield routed
                            yield heads[-1]
                            heads.clear()
                        yield RelayedChunk(data)
                    chunks = await stream.read()
        except GatewayError as error:
            error.is_relayed = True
            raise
        finally:
            usage = self._usage_of(run, request, cutter, len(body))
        last = cutter.usage_chunk()
        if last is not None:
            yield RelayedChunk(last)
        yield RelayEnded(cutter.finish_reason, usage)

    def _usage_of(self, run: Run, request: RelayRequest, cutter: _ChunkCutter, request_bytes: int) -> Usage | None:
        """Charge a stream, also one that was cut or that nobody waits for: the upstream counts it, too."""
        if cutter.texts is not None and (span := current_span()) is not None:
            message = {"role": "assistant", "content": "".join(cutter.texts)}
            span.say(OUTPUT_MESSAGES, msgspec.json.encode([{"message": message}]).decode())
        return self._charged(run, request.path, cutter.usage_of(request_bytes)) if cutter.began else None

    def _relayed_body(self, data: bytes, run: Run, request: RelayRequest, request_bytes: int) -> RelayedBody:
        fields = _decode_fields(data, self._binding.upstream.name)
        raw_choices = fields.get("choices", _NULL)
        ends = _ENDS.decode(raw_choices)
        usage = _usage(fields.get("usage"))
        if usage is None:
            usage = estimate_usage(request_bytes, _characters_of(raw_choices))
        reason = ends[0].finish_reason if ends else None
        if (span := current_span()) is not None and span.with_content:
            span.say(OUTPUT_MESSAGES, bytes(raw_choices).decode())
        fields["model"] = Raw(msgspec.json.encode(run.model))
        return RelayedBody(msgspec.json.encode(fields), reason or "stop", self._charged(run, request.path, usage))

    def _charged(self, run: Run, path: str, usage: Usage) -> Usage:
        target = self._binding.upstream
        upstream, model = target.served if isinstance(target, RoutedUpstream) else (target.name, self._binding.model)
        usage = self._meter.charge(usage, run, upstream=upstream, model=model, path=path, byok=target.is_lent)
        lost = target.lost if isinstance(target, RoutedUpstream) else None
        if lost is not None:
            spent = estimate_usage(lost.body_bytes, 0)
            usage += self._meter.charge(
                spent, run, upstream=lost.upstream, model=lost.model, path=path, byok=lost.is_lent
            )
        if run.reservation is not None:
            run.reservation.settle(usage)
        return usage

    def _body(self, request: RelayRequest, streamed: bool) -> bytes:
        fields: dict[str, Any] = {str(name): raw for name, raw in request.fields.items()}
        fields["model"] = self._binding.model
        if request.path not in STREAMED_PATHS:
            return msgspec.json.encode(fields)
        if streamed:
            # The usage numbers are wanted here in any case; a client that did not ask never sees the chunk.
            given = fields.get("stream_options")
            options = decode_value(given, "stream_options") if isinstance(given, Raw) else None
            fields["stream"] = True
            fields["stream_options"] = {**(options or {}), "include_usage": True}
        else:
            fields.pop("stream", None)
            fields.pop("stream_options", None)
        return msgspec.json.encode(fields)


def _relay_request(run: Run) -> RelayRequest:
    if not isinstance(run.request, RelayRequest):
        raise GatewayError("A raw upstream model serves relayed requests only.")
    return run.request


def _decision(upstream: Target) -> Routed | None:
    return upstream.decision if isinstance(upstream, RoutedUpstream) else None


def _keep_in(heads: list[RelayedHead]) -> OnHead:
    return lambda status, headers: heads.append(RelayedHead(shown_headers(headers)))


_Number = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]


class _Details(Struct):
    cached_tokens: _Number | None = None
    cache_write_tokens: _Number | None = None
    reasoning_tokens: _Number | None = None
    audio_tokens: _Number | None = None


class _Tokens(Struct):
    prompt_tokens: _Number | None = None
    completion_tokens: _Number | None = None
    total_tokens: Any = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    cache_creation_input_tokens: _Number | None = None
    cost: Any = None


class _Content(Struct):
    content: Any = None


class _End(Struct):
    finish_reason: str | None = None


class _WholeChoice(Struct):
    message: _Content | None = None
    text: Any = None


_NULL = Raw(b"null")
_TOKENS = msgspec.json.Decoder(_Tokens | None)
_CHOICES = msgspec.json.Decoder(list[Choice] | None)
_WHOLE_CHOICES = msgspec.json.Decoder(list[_WholeChoice] | None)
_ENDS = msgspec.json.Decoder(list[_End] | None)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])


class _ChunkCutter:
    """Makes the chunks of one stream presentable, and keeps what they say about usage and the end."""

    def __init__(self, model: str, upstream: str, keys: frozenset[str], include_usage: bool) -> None:
        self._model = Raw(msgspec.json.encode(model))
        self._upstream = upstream
        self._keys = keys
        self._include_usage = include_usage
        self._usage_sent = False
        self._raw_usage: Raw | None = None
        self._first: dict[str, Raw] = {}
        self._frame: Frame | None = None
        self._head = b""
        self._tail = b',"usage":null}' if include_usage else b"}"
        self._text_chars = 0
        span = current_span()
        self.texts: list[str] | None = [] if span is not None and span.with_content else None
        self.began = False
        self.finish_reason = "stop"

    def usage_of(self, request_bytes: int) -> Usage:
        """Return the upstream's own numbers, or an estimate where it gave none."""
        return _usage(self._raw_usage) or estimate_usage(request_bytes, self._text_chars)

    def cut(self, chunk: Chunk) -> bytes | None:
        """Return the chunk to send, or None for one that only carries what the client did not ask for."""
        frame = chunk.frame
        if frame is None:
            return self._cut_whole(chunk.data)
        if frame is not self._frame:
            self._frame, self._head = frame, self._cut_head(frame)
        self._note(chunk.choices)
        return self._head + chunk.data[len(frame.head) : chunk.end] + chunk.padding + self._tail

    def _cut_head(self, frame: Frame) -> bytes:
        fields = self._presentable(frame.fields)
        fields["model"] = self._model
        self._remember(fields)
        return msgspec.json.encode(fields)[:-1] + b',"choices":'

    def _presentable(self, fields: Mapping[str, Raw]) -> dict[str, Raw]:
        return {name: raw for name, raw in fields.items() if name in self._keys}

    def _remember(self, fields: Mapping[str, Raw]) -> None:
        """Keep what a usage chunk of our own begins with."""
        if self._include_usage and not self._first:
            self._first = {name: Raw(bytes(fields[name])) for name in ("id", "object", "created") if name in fields}

    def _note(self, choices: Iterable[Choice]) -> None:
        self.began = True
        for choice in choices:
            delta = choice.delta
            text = choice.text if delta is None else delta.content
            if text.__class__ is str:
                self._text_chars += len(text)
                if self.texts is not None:
                    self.texts.append(text)
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason

    def _cut_whole(self, data: bytes) -> bytes | None:
        fields = self._presentable(_decode_fields(data, self._upstream))
        usage = fields.pop("usage", None)
        if usage is not None and bytes(usage) != b"null":
            self._raw_usage = Raw(bytes(usage))
        else:
            usage = None
        fields["model"] = self._model
        raw_choices = fields.get("choices", _NULL)
        try:
            choices = _CHOICES.decode(raw_choices)
        except msgspec.ValidationError:
            choices = _ends(raw_choices)
        if not choices:
            if usage is not None:
                self.began = True
                if not self._include_usage:
                    return None
                self._usage_sent = True
                fields["usage"] = usage
                return msgspec.json.encode(fields)
            if "choices" not in fields:
                # A frame that is no chunk at all (a server's own ping or status).
                return None
        else:
            self._note(choices)
        self._remember(fields)
        if self._include_usage:
            fields["usage"] = _NULL
        return msgspec.json.encode(fields)

    def usage_chunk(self) -> bytes | None:
        """Return the usage chunk that was asked for where the upstream put its numbers elsewhere."""
        if not self._include_usage or self._usage_sent or self._raw_usage is None:
            return None
        return msgspec.json.encode({**self._first, "model": self._model, "choices": [], "usage": self._raw_usage})


def _ends(raw_choices: Raw) -> list[Choice]:
    """Return how choices of an unusual shape ended; their text counts for nothing."""
    return [Choice(finish_reason=end.finish_reason) for end in _ENDS.decode(raw_choices) or ()]


def _characters_of(raw_choices: Raw) -> int:
    """Return how much text a whole answer has, for an estimate."""
    try:
        choices = _WHOLE_CHOICES.decode(raw_choices) or ()
    except msgspec.ValidationError:
        return 0
    texts = (choice.text if choice.message is None else choice.message.content for choice in choices)
    return sum(len(text) for text in texts if isinstance(text, str))


def _decode_fields(data: bytes, upstream: str) -> dict[str, Raw]:
    try:
        return _FIELDS.decode(data)
    except msgspec.DecodeError as error:
        raise UpstreamMalformed(f"The upstream '{upstream}' sent something that is not a JSON object.") from error


def _usage(raw: Raw | None) -> Usage | None:
    """Read the upstream's numbers; a shape nobody knows counts as none."""
    if raw is None:
        return None
    try:
        tokens = _TOKENS.decode(raw)
    except msgspec.DecodeError:
        return None
    if tokens is None or (tokens.prompt_tokens is None and tokens.completion_tokens is None):
        return None
    prompt, completion = tokens.prompt_tokens_details, tokens.completion_tokens_details
    cost = None if tokens.cost is None else reported_cost(tokens.cost)
    read, written, thought = (
        tokens.prompt_tokens or 0,
        tokens.completion_tokens or 0,
        (completion.reasoning_tokens or 0) if completion else 0,
    )
    cached = (prompt.cached_tokens or 0) if prompt else 0
    cache_write = tokens.cache_creation_input_tokens or (prompt and prompt.cache_write_tokens) or 0
    total = tokens.total_tokens
    is_whole = tokens.prompt_tokens is not None and tokens.completion_tokens is not None
    if is_whole and total.__class__ is int and total <= MOST_TOKENS:
        written, thought = with_thoughts(read, written, total, thought, cached + cache_write)
    return Usage(
        input_tokens=read,
        output_tokens=written,
        cached_input_tokens=cached,
        reasoning_tokens=thought,
        requests=1,
        audio_input_tokens=(prompt.audio_tokens or 0) if prompt else 0,
        audio_output_tokens=(completion.audio_tokens or 0) if completion else 0,
        cost=cost,
        cost_reported=cost is not None,
        cache_write_tokens=cache_write,
    )
