"""Chunks of a stream are read once, and mostly in part: what reaches the client is what reading all of each gives."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.chat import decode_body, decode_relay
from gateway.errors import GatewayError, UpstreamMalformed
from gateway.events import RelayedChunk, RunEvent
from gateway.principal import Principal
from gateway.run import Run
from gateway.runs.relay import CHUNK_KEYS, RelayExecutor
from gateway.upstreams.client import EventSource, Take, Upstream
from gateway.upstreams.config import UpstreamConfig
from gateway.upstreams.relaying import ByteRequest, OnHead
from gateway.upstreams.table import ModelBinding

END = b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"},{"index":1,"finish_reason":"stop"}]}'


class Told(Upstream):
    """An upstream inside the process that streams these events."""

    def __init__(self, events: Iterable[bytes]) -> None:
        super().__init__(UpstreamConfig(name="up", base_url="http://127.0.0.1:1/v1"))
        self._events = [*events, END, b"[DONE]"]

    async def _open(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> EventSource:
        return _Events(self._events)

    async def _post(self, *_: object) -> bytes:
        raise NotImplementedError

    def _relay(
        self, request: ByteRequest, request_id: str | None, on_head: OnHead | None
    ) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def probe(self) -> None:
        return None

    async def fetch_models(self) -> tuple[str, ...]:
        return ()

    def retire(self) -> None:
        return None

    async def aclose(self) -> None:
        return None


class _Events:
    def __init__(self, events: list[bytes]) -> None:
        self._left = iter(events)

    async def read(self) -> list[bytes]:
        return [data for data in [next(self._left, None)] if data is not None]

    async def pipe(self, take: Take) -> None:
        while take([next(self._left)]) is not None:
            pass

    def release(self) -> None:
        return None

    def close(self, *, drain: bool = False) -> None:
        return None


def relayed(events: Iterable[bytes], *, usage: bool = False) -> list[bytes]:
    """What the client is sent, without the last chunk."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    fields = decode_body(json.dumps({"model": "up/m", "messages": [], "stream": True, **options}).encode())
    run = Run(
        id=uuid.uuid4(),
        request_id="req-1",
        principal=Principal("p", "k", ("*",)),
        model="up/m",
        request=decode_relay("up/m", fields),
        streamed=True,
        created=0,
        deadline_s=30,
    )

    async def main() -> list[RunEvent]:
        return [event async for event in RelayExecutor(ModelBinding(Told(events), "m")).execute(run)]

    return [event.data for event in asyncio.run(main()) if isinstance(event, RelayedChunk)][:-1]


def expected(event: bytes, *, usage: bool) -> dict[str, Any]:
    """What the client is to be sent for one chunk, by reading all of it."""
    fields = {key: value for key, value in json.loads(event).items() if key in CHUNK_KEYS - {"usage"}}
    return fields | {"model": "up/m"} | ({"usage": None} if usage else {})


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


CHOICES = st.sampled_from(
    [
        '[{"index":0,"delta":{"content":"a"},"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"]}"},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"\\"choices\\":[{"},"finish_reason":null}]',
        '[ {"index":1,"delta":{"reasoning":"é","x":[1]}} ]',
        '[{"index":0,"delta":{"content":"b"},"finish_reason":null},{"index":1,"text":"c"}]',
        '[{"index":0,"delta":"odd","finish_reason":null}]',
    ]
)
MEMBERS = st.sampled_from(
    [
        '"id":"1"',
        '"id":"2"',
        '"object":"chat.completion.chunk"',
        '"model":"real"',
        '"created":7',
        '"event":{"type":"execute","data":"x"}',
        '"event":[{"type":"execute"}]',
        '"\\u0065vent":[1]',
        '"x":{"choices":[{"index":0}]}',
        '"x":"\\"choices\\":[1]"',
        '"obfuscation":"abc"',
        '"obfuscation":"]}"',
        '"usage":null',
        '"error":null',
        '"service_tier":"é"',
        '"choices":[{"index":0,"delta":{"content":"twice"}}]',
        '"\\u0063hoices":[{"index":0,"delta":{"content":"hidden"}}]',
    ]
)
HEADS = st.lists(MEMBERS, max_size=4).map(tuple)
TAILS = st.one_of(
    st.sampled_from([(), ('"usage":null',), ('"usage":null', '"obfuscation":"aZ09"'), ('"obfuscation":"q"',)]),
    st.lists(MEMBERS, max_size=3).map(tuple),
)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Chunks that mostly begin alike."""
    heads = draw(st.lists(HEADS, min_size=1, max_size=2))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))

    def member(text: str) -> str:
        key, _, value = text.partition('":')
        return f'{key}"{separators[1]}{value}'

    events = []
    for _ in range(draw(st.integers(1, 6))):
        parts = (*draw(st.sampled_from(heads)), f'"choices":{draw(CHOICES)}', *draw(TAILS))
        events.append(("{" + separators[0].join(map(member, parts)) + "}").encode())
    return events


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(streams(), st.booleans())
@example([b'{"id":"1","choices":[{"index":0}]}', b'{"id":"1","choices":[{"index":0}],"event":[1]}'], False)
@example([b'{"id":"1","choices":[{"index":0}]}', b'{"id":"1","choices":[],"choices":[{"index":0}]}'], False)
def test_a_client_is_sent_what_reading_all_of_each_chunk_gives(events: list[bytes], usage: bool) -> None:
    sent = [json.loads(data, object_pairs_hook=unrepeated) for data in relayed(events, usage=usage)]
    assert sent == [expected(event, usage=usage) for event in events]


FIRST = b'{"id":"1","choices":[{"index":0,"delta":{"content":"a"}}]}'


@pytest.mark.parametrize(
    "event",
    [
        b'{"id":"1","choices":[{"index":0}]',
        b'{"id":"1","choices":[{"index":0}]]}',
        b'{"id":"1","choices":[{"index":0}],}',
        b'{"id":"1","choices":[{"index":0}]}{"event":[1]}',
        b'{"id":"1","choices":[{"index":0},]}',
        b'{"id":"1","choices":[{"index":0,"x":"\xff"}]}',
        b'{"id":"1","choices":[{"index":"one"}]}',
        b'{"id":"1","choices":{"index":0,"x":[1]}',
        b'{"id":"1","choices":' + b"[" * 100_000 + b"]}",
    ],
)
def test_what_is_no_chunk_is_refused_also_where_it_begins_like_one(event: bytes) -> None:
    with pytest.raises(UpstreamMalformed):
        relayed([FIRST, event])


def test_an_error_behind_the_choices_is_an_error() -> None:
    with pytest.raises(GatewayError, match="broken"):
        relayed([FIRST, b'{"id":"1","choices":[{"index":0}],"error":{"message":"broken","code":[1]}}'])
