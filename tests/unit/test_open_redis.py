"""The one Redis client: bytes out, quick to say that nobody answers."""

from __future__ import annotations

import asyncio
import os
import secrets
import time

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.errors import ConfigError
from gateway.store.redis import open_redis
from tests.support.waiting import in_time

REDIS = os.environ.get("GATEWAY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")


def test_a_value_comes_back_as_bytes() -> None:
    key = f"gateway-test:{secrets.token_hex(6)}"

    async def work() -> object:
        async with open_redis(REDIS) as redis:
            await redis.set(key, "value", ex=10)
            return await redis.getdel(key)

    try:
        assert asyncio.run(work()) == b"value"
    except RedisConnectionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Redis at GATEWAY_TEST_REDIS_URL ({error})")


def test_a_server_that_is_down_is_said_within_a_second_and_not_tried_again() -> None:
    async def work() -> float:
        async with open_redis("redis://127.0.0.1:9/0") as redis:
            started = time.monotonic()
            with pytest.raises(RedisConnectionError):
                await redis.ping()
            return time.monotonic() - started

    in_time(lambda: asyncio.run(work()), 1)


@pytest.mark.parametrize("url", ["http://h", "redis:///0", "127.0.0.1:6379", "redis://h:port/0"])
def test_a_wrong_url_is_refused_without_being_repeated(url: str) -> None:
    async def work() -> None:
        async with open_redis(url):
            pass

    with pytest.raises(ConfigError) as caught:
        asyncio.run(work())
    assert "GATEWAY_REDIS_URL" in caught.value.message
    assert url not in caught.value.message
