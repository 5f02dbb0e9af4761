"""Several keys of one upstream: used in turn, put aside when refused or limited, never shown."""

from __future__ import annotations

import asyncio
import logging

import pytest

from gateway.errors import UpstreamAuthFailed, UpstreamRateLimited
from gateway.upstreams.client import HttpUpstream
from gateway.upstreams.config import UpstreamConfig
from gateway.upstreams.keys import LIMITED_S, REFUSED_S, UpstreamKeys
from tests.support.scripted_upstream import Answer, ScriptedUpstream
from tests.support.upstream_calls import chat_request

KEYS = ("sk-canary-zero-0000000000", "sk-canary-one-11111111111", "sk-canary-two-22222222222")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(keys: UpstreamKeys, count: int) -> list[int]:
    numbers = []
    for _ in range(count):
        key = keys.take()
        assert key is not None
        numbers.append(key.number)
    return numbers


def test_keys_are_used_in_turn() -> None:
    assert taken(UpstreamKeys("up", KEYS), 6) == [0, 1, 2, 0, 1, 2]
    assert taken(UpstreamKeys("up", KEYS[:1]), 2) == [0, 0]
    assert UpstreamKeys("up", ()).take() is None


@pytest.mark.parametrize(
    ("status", "wait_s", "aside_s"),
    [(401, None, REFUSED_S), (403, 5.0, REFUSED_S), (429, 7.0, 7.0), (429, None, LIMITED_S)],
)
def test_a_refused_or_limited_key_is_put_aside_for_a_while(
    status: int, wait_s: float | None, aside_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = UpstreamKeys("up", KEYS, clock)
    with caplog.at_level(logging.WARNING):
        keys.answered(keys.take(), status, wait_s)
    assert taken(keys, 4) == [1, 2, 1, 2]
    clock.now += aside_s
    assert 0 in taken(keys, 3)
    assert "Key 0" in caplog.text
    assert "canary" not in caplog.text


def test_when_all_are_aside_the_one_that_is_back_soonest_serves() -> None:
    keys = UpstreamKeys("up", KEYS[:2], Clock())
    keys.answered(keys.take(), 401, None)
    keys.answered(keys.take(), 429, 3.0)
    assert taken(keys, 3) == [1, 1, 1]


def test_each_request_shows_the_next_key_and_a_refused_one_rests() -> None:
    async def main(server: ScriptedUpstream) -> None:
        upstream = HttpUpstream(UpstreamConfig(name="up", base_url=server.base_url, api="chat", api_keys=KEYS))
        server.enqueue(
            Answer(status=401, body={"error": {"message": f"bad key {KEYS[0]}"}}),
            Answer(text="a"),
            Answer(status=429, headers={"retry-after": "20"}, body={"error": {"message": "slow down"}}),
            Answer(text="b"),
            Answer(text="c"),
        )
        try:
            with pytest.raises(UpstreamAuthFailed) as refused:
                await upstream.chat(chat_request())
            assert "canary" not in refused.value.message
            await upstream.chat(chat_request())
            with pytest.raises(UpstreamRateLimited):
                await upstream.chat(chat_request())
            await upstream.chat(chat_request())
            await upstream.chat(chat_request())
        finally:
            await upstream.aclose()

    with ScriptedUpstream() as server:
        asyncio.run(main(server))
        shown = [request.headers["authorization"].removeprefix("Bearer ") for request in server.requests]
    assert shown == [KEYS[0], KEYS[1], KEYS[2], KEYS[1], KEYS[1]]


@pytest.mark.parametrize(
    ("provider", "post", "get"),
    [
        ("openai-compatible", ("authorization", "Bearer k-0123456789"), ("authorization", "Bearer k-0123456789")),
        ("azure", ("api-key", "k-0123456789"), ("api-key", "k-0123456789")),
        ("anthropic", ("authorization", "Bearer k-0123456789"), ("x-api-key", "k-0123456789")),
    ],
)
def test_the_key_goes_where_the_provider_wants_it(provider: str, post: tuple[str, str], get: tuple[str, str]) -> None:
    async def main(server: ScriptedUpstream) -> None:
        upstream = HttpUpstream(
            UpstreamConfig(name="up", provider=provider, base_url=server.base_url, api="chat", api_key="k-0123456789")
        )
        try:
            await upstream.chat(chat_request())
            assert await upstream.fetch_models() == ("scripted",)
        finally:
            await upstream.aclose()

    with ScriptedUpstream() as server:
        asyncio.run(main(server))
        (chat,), (models,) = server.requests, server.listings
    for request, (name, value) in ((chat, post), (models, get)):
        names = {"authorization", "api-key", "x-api-key"} & request.headers.keys()
        assert names == {name}
        assert request.headers[name] == value
    assert models.method == "GET"
    assert models.path == "/v1/models"
