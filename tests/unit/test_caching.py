"""The response cache from the inside: keys, bounds, calls that are shared, and a Redis that is there or is not."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.caching.cache import ResponseCache
from gateway.caching.config import CacheConfig, CacheRule, CacheRules, MemoryLimits, RedisRules, load_cache
from gateway.caching.directives import CacheControl, read_cache_control
from gateway.caching.entry import Entry, is_finished, with_id
from gateway.caching.flights import Flight
from gateway.caching.keys import answer_key, is_stored_upstream, uses_tools
from gateway.caching.memory import MemoryStore
from gateway.caching.redis import RedisStore
from gateway.chat import decode_body
from gateway.config import Settings
from gateway.errors import ConfigError, GatewayError, ShuttingDown, UpstreamError
from gateway.events import RelayedBody, RelayedChunk, RelayEnded, RunEvent
from gateway.principal import Principal
from gateway.store.redis import open_redis
from tests.support.upstream_calls import until
from tests.support.waiting import in_time

REDIS_URL = os.environ.get("GATEWAY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
END = RelayEnded("stop", None)
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]'


def key(body: bytes = CHAT + b"}", **changes: Any) -> str:
    given: dict[str, Any] = {
        "principal": Principal(id="a", key_id="a", allow=()),
        "sharing": "key",
        "path": "/chat/completions",
        "model": "up/m",
        "streamed": False,
        "targets": [("up", "http://up/v1", "m")],
    }
    return answer_key(**given | changes, fields=decode_body(body))


def test_a_key_is_the_same_for_what_every_parser_reads_alike() -> None:
    same = [
        CHAT + b"}",
        b'{"messages":[{"role":"user","content":"Hi"}],"model":"m"}',
        CHAT + b', "stream": false, "metadata": {"job": "7"}, "prompt_cache_key": "x"}',
    ]
    assert len({key(body) for body in same}) == 1


@pytest.mark.parametrize(
    "body",
    [
        CHAT + b', "temperature": 0}',
        CHAT + b', "temperature": 0.0}',
        CHAT + b', "top_k": 1}',
        CHAT + b', "user": "u1"}',
        CHAT + b', "seed": null}',
        CHAT.replace(b"Hi", b"hi") + b"}",
        # The same object to a parser that takes the last of two keys, another to one that takes the first.
        CHAT.replace(b'"content"', b'"content": "x", "content"') + b"}",
        CHAT.replace(b"user", rb"\u0075ser") + b"}",
    ],
)
def test_whatever_may_change_the_answer_changes_the_key(body: bytes) -> None:
    assert key(body) != key()


def test_keys_differ_by_who_may_see_the_answer_and_where_it_comes_from() -> None:
    others = [Principal(id="b", key_id="b", allow=()), Principal(id="a", key_id="a", allow=(), namespace="labs")]
    tenant = Principal(id="a", key_id="a", allow=(), tenant="other")
    for sharing, apart in (("key", 2), ("namespace", 1), ("everyone", 0)):
        mine = key(sharing=sharing)
        assert len({key(sharing=sharing, principal=other) for other in others} - {mine}) == apart, sharing
        assert key(sharing=sharing, principal=tenant) != mine
    assert len({key(sharing=sharing) for sharing in ("key", "namespace", "everyone")}) == 3
    for change in (
        {"path": "/completions"},
        {"model": "alias"},
        {"streamed": True},
        {"targets": [("up", "http://elsewhere/v1", "m")]},
        {"targets": [("up", "http://up/v1", "m2")]},
    ):
        assert key(**change) != key(), change


def test_the_user_of_a_request_counts_unless_answers_are_everyones() -> None:
    named = [CHAT + b', "user": "u1"}', CHAT + b', "user": "u2", "safety_identifier": "s"}']
    assert len({key(body) for body in named}) == 2
    assert len({key(body, sharing="everyone") for body in named}) == 1


def test_stream_options_count_where_the_answer_is_a_stream() -> None:
    body = CHAT + b', "stream": true, "stream_options": {"include_usage": true}}'
    assert key(body, streamed=True) != key(CHAT + b', "stream": true}', streamed=True)


@pytest.mark.parametrize(
    ("more", "tools", "stored"),
    [
        (b"}", False, False),
        (b', "tools": []}', False, False),
        (b', "tools": null, "store": false}', False, False),
        (b', "tools": [{"type": "function"}]}', True, False),
        (b', "tool_choice": "none"}', True, False),
        (b', "functions": [{"name": "f"}]}', True, False),
        (b', "web_search_options": {}}', True, False),
        (b', "store": true}', False, True),
    ],
)
def test_requests_with_tools_and_with_effects_are_told_apart(more: bytes, tools: bool, stored: bool) -> None:
    fields = decode_body(CHAT + more)
    assert (uses_tools(fields), is_stored_upstream(fields)) == (tools, stored)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, CacheControl()),
        ("no-cache", CacheControl(no_cache=True)),
        ("No-Store, x", CacheControl(no_store=True)),
        ("max-age=0", CacheControl(no_cache=True, max_age_s=0)),
        ('private, max-age="60"', CacheControl(max_age_s=60)),
        ("max-age=soon", CacheControl()),
    ],
)
def test_directives_of_a_request(text: str | None, expected: CacheControl) -> None:
    assert read_cache_control(text) == expected


def test_only_answers_in_which_every_choice_ended_well_are_finished() -> None:
    good = frozenset({"stop", "length"})

    def part(*ends: tuple[int, str | None]) -> bytes:
        return msgspec.json.encode({"choices": [{"index": i, "finish_reason": reason} for i, reason in ends]})

    assert is_finished([part((0, "stop"), (1, "length"))], good)
    assert is_finished([part((0, None)), part((0, "stop")), b'{"choices": []}'], good)
    assert is_finished([b'{"data": []}'], good)
    assert not is_finished([part((0, "stop"), (1, "content_filter"))], good)
    assert not is_finished([part((0, "stop"), (1, None))], good)
    assert not is_finished([b'{"choices": {"a": 1}}'], good)


def test_an_answer_is_given_again_under_another_id() -> None:
    assert msgspec.json.decode(with_id(b'{"id": "x", "n": 1.0}', "y")) == {"id": "y", "n": 1.0}
    assert with_id(b'{"data": []}', "y") == b'{"data": []}'


# Memory


def entry(size: int = 100) -> Entry:
    return Entry(0.0, "stop", (b"x" * size,))


def test_memory_is_bounded_in_bytes_and_entries_and_time() -> None:
    now = [0.0]
    store = MemoryStore(lambda: now[0])
    store.limits = MemoryLimits(max_bytes=3 * entry(1000).size, max_entries=1000)
    for number in range(4):
        store.put(f"k{number}", entry(1000), 60)
        store.get("k0")
    assert [store.get(f"k{n}") is not None for n in range(4)] == [True, False, True, True]
    assert store.bytes == 3 * entry(1000).size
    store.put("huge", entry(10_000), 60)
    assert store.get("huge") is None
    store.limits = MemoryLimits(max_entries=1)
    store.shrink()
    assert len(store) == 1
    now[0] = 60
    assert store.get("k3") is None
    assert (len(store), store.bytes) == (0, 0)


# Rules


def rules(tmp_path: Path, text: str, **settings: Any) -> CacheRules:
    path = tmp_path / "cache.yaml"
    path.write_text(text, encoding="utf-8")
    return load_cache(Settings(cache_config=path, **settings))


def test_an_exact_name_comes_before_patterns_in_the_order_written(tmp_path: Path) -> None:
    found = rules(
        tmp_path,
        'models: [{match: "up/*", ttl_s: 1}, {match: "*", ttl_s: 2}, {match: up/m, ttl_s: 3}]',
    )
    assert [rule.ttl_s for name in ("up/m", "up/x", "other") if (rule := found.find(name))] == [3, 1, 2]
    assert rules(tmp_path, "models: [{match: up/m}]").find("up/x") is None
    assert not rules(tmp_path, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{match: a}, {match: a}]", "stands there twice"),
        ("models: [{match: a, backend: redis}]", "GATEWAY_REDIS_URL"),
        ("models: [{match: a, shared: true}]", "unknown key 'shared'"),
        ("models: [{match: a, ttl_s: 0}]", "ttl_s"),
    ],
)
def test_wrong_rules_are_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules(tmp_path, text)


# Flights


class Call:
    """A call that a test leads by hand."""

    def __init__(self) -> None:
        self.next: asyncio.Queue[RunEvent | Exception] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.taken = 0

    async def events(self) -> AsyncGenerator[RunEvent, None]:
        try:
            while True:
                item = await self.next.get()
                if isinstance(item, Exception):
                    raise item
                self.taken += 1
                yield item
                if isinstance(item, RelayEnded | RelayedBody):
                    return
        finally:
            self.closed.set()


def flying(call: Call, limit: int = 1000) -> Flight:
    flight = Flight(limit)
    flight.start(call.events(), lambda: None)
    return flight


async def read(events: AsyncGenerator[RunEvent, None]) -> list[RunEvent]:
    async with aclosing(events):
        return [event async for event in events]


@pytest.mark.anyio
async def test_everyone_reads_the_same_events_and_one_is_charged() -> None:
    call = Call()
    flight = flying(call)
    first, second = flight.join(), flight.join()
    reading = asyncio.gather(read(first.events()), read(second.events()))
    for event in (RelayedChunk(b"a"), RelayedChunk(b"b")):
        call.next.put_nowait(event)
    await until(lambda: call.taken == 2)
    late = flight.join()
    call.next.put_nowait(END)
    assert await reading == [[RelayedChunk(b"a"), RelayedChunk(b"b"), END]] * 2
    assert await read(late.events()) == [RelayedChunk(b"a"), RelayedChunk(b"b"), END]


@pytest.mark.anyio
async def test_the_call_is_charged_once_to_whoever_is_left() -> None:
    call = Call()
    flight = flying(call)
    readers = [flight.join() for _ in range(3)]
    gone = readers[0].events()
    call.next.put_nowait(RelayedChunk(b"a"))
    assert await anext(gone) == RelayedChunk(b"a")
    await gone.aclose()
    assert not call.closed.is_set()
    call.next.put_nowait(END)
    charged = []
    for reader in readers[1:]:
        async with aclosing(reader.events()) as events:
            charged += [reader.claims_cost() async for event in events if event == END]
    assert charged == [True, False]


@pytest.mark.anyio
async def test_the_call_ends_with_its_last_reader() -> None:
    call = Call()
    flight = flying(call)
    first, second = flight.join().events(), flight.join().events()
    call.next.put_nowait(RelayedChunk(b"a"))
    await asyncio.gather(anext(first), anext(second))
    await first.aclose()
    assert not call.closed.is_set()
    await second.aclose()
    assert call.closed.is_set()
    assert not flight.is_joinable


@pytest.mark.anyio
async def test_an_answer_that_is_too_large_is_not_kept_and_waits_for_its_slowest_reader() -> None:
    call = Call()
    flight = flying(call, limit=10)
    slow, fast = flight.join().events(), flight.join().events()
    for _ in range(20):
        call.next.put_nowait(RelayedChunk(b"12345678"))
    call.next.put_nowait(END)
    reading = asyncio.create_task(read(fast))
    assert await anext(slow)
    await until(lambda: not flight.is_joinable)
    for _ in range(20):
        await asyncio.sleep(0)
    assert call.taken < 6
    assert not reading.done()
    rest = await read(slow)
    assert rest[-1] == END and len(rest) == 20
    assert len(await reading) == 21


@pytest.mark.anyio
async def test_a_flight_that_is_stopped_fails_its_readers() -> None:
    call = Call()
    flight = Flight(10)
    task = flight.start(call.events(), lambda: None)
    reading = asyncio.create_task(read(flight.join().events()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(ShuttingDown):
        await reading


@pytest.mark.anyio
async def test_every_reader_is_told_of_a_failure() -> None:
    call = Call()
    flight = flying(call)
    reading = [asyncio.create_task(read(flight.join().events())) for _ in range(2)]
    await asyncio.sleep(0)
    call.next.put_nowait(UpstreamError("no"))
    results = await asyncio.gather(*reading, return_exceptions=True)
    assert [str(result) for result in results] == ["no", "no"]
    assert not flight.is_joinable


# Redis


class Counted:
    def __init__(self) -> None:
        self.errors = 0

    def cache_error(self, backend: str) -> None:
        assert backend == "redis"
        self.errors += 1

    def cache_request(self, model: str, result: str) -> None:
        pass

    def cache_memory(self, entries: int, size: int) -> None:
        pass


@asynccontextmanager
async def redis_store(
    url: str = REDIS_URL, clock: Callable[[], float] | None = None, *, timeout_s: float = 5
) -> AsyncIterator[tuple[RedisStore, Counted]]:
    metrics, tasks = Counted(), set[asyncio.Future[None]]()

    def spawn(work: Awaitable[None]) -> None:
        tasks.add(asyncio.ensure_future(work))

    async with open_redis(url) as client:
        if url == REDIS_URL:
            try:
                await client.ping()
            except Exception as error:
                if os.environ.get("CI") == "true":
                    raise
                pytest.skip(f"no Redis at GATEWAY_TEST_REDIS_URL ({type(error).__name__})")
        more = {"clock": clock} if clock else {}
        yield RedisStore(client, RedisRules(timeout_s=timeout_s, pause_s=1), metrics, spawn, **more), metrics
        await asyncio.gather(*tasks)


@pytest.mark.anyio
async def test_redis_keeps_an_answer_for_its_time() -> None:
    name = secrets.token_hex(8)
    async with redis_store() as (store, metrics):
        assert await store.get(name) is None
        await store.put(name, Entry(5.0, "stop", (b"a", b"b")), 60)
        assert await store.get(name) == Entry(5.0, "stop", (b"a", b"b"))
        assert 59_000 < await store._client.pttl(f"gateway:cache:{name}") <= 60_000
        await store._client.set(f"gateway:cache:{name}", b"\xff rubbish", px=1000)
        assert await store.get(name) is None
        assert metrics.errors == 1


@pytest.mark.anyio
async def test_one_process_fetches_and_the_others_wait_no_longer_than_the_bound() -> None:
    name = secrets.token_hex(8)
    async with redis_store() as (store, _), redis_store() as (other, _):
        assert await store.await_turn(name, "one", 5) == (None, True)
        waiting = asyncio.create_task(other.await_turn(name, "two", 5))
        await store.put(name, entry(), 60)
        assert await waiting == (entry(), False)
        await store.release(name, "not ours")
        assert (await other.await_turn(name, "three", 5))[1] is False
        await store.release(name, "one")

        # The first one failed: who waits takes over. The first one is too slow: who waits goes by itself.
        name = secrets.token_hex(8)
        assert await store.await_turn(name, "one", 5) == (None, True)
        waiting = asyncio.create_task(other.await_turn(name, "two", 5))
        await store.release(name, "one")
        assert await waiting == (None, True)
        assert await store.await_turn(name, "three", 0.1) == (None, False)
        await store.release(name, "two")


@pytest.mark.anyio
async def test_a_redis_that_is_down_costs_nothing_and_is_found_again() -> None:
    now = [100.0]
    async with redis_store("redis://127.0.0.1:9/0", lambda: now[0]) as (store, metrics):
        assert await store.get("k") is None
        assert metrics.errors == 1
        for _ in range(100):
            assert await store.get("k") is None
            assert await store.await_turn("k", "t", 5) == (None, False)
        assert metrics.errors == 1
        now[0] += 1
        assert await store.get("k") is None  # a ping in the background, not this request, finds out
        await until(lambda: metrics.errors == 2)
        async with open_redis(REDIS_URL) as client:
            store._client, there = client, store._client
            now[0] += 1
            assert await store.get("k") is None
            await until(lambda: not store._is_down)
            assert await store.get("gateway-no-such-key") is None
            store._client = there


def test_a_redis_that_hangs_is_given_up_in_time() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def work() -> float:
        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        async with server, redis_store(url, timeout_s=0.25) as (store, metrics):
            started = asyncio.get_running_loop().time()
            assert await store.get("k") is None
            took = asyncio.get_running_loop().time() - started
            assert metrics.errors == 1
            return took

    in_time(lambda: asyncio.run(work()), 1)


@pytest.mark.anyio
async def test_the_cache_stops_what_is_under_way_when_it_closes() -> None:
    call = Call()
    async with ResponseCache(Counted()) as cache:
        table = await cache.follow(CacheRules(CacheConfig(models=(CacheRule(match="*"),))))
        assert table is not None
        flight = cache.start_flight("k", call.events(), 1000)
        assert cache.find_flight("k") is flight
        reading = asyncio.create_task(read(flight.join().events()))
        await asyncio.sleep(0)
    with pytest.raises(GatewayError):
        await reading
    assert call.closed.is_set()
    assert cache.find_flight("k") is None
