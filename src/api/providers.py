"""`/api/v1/providers` and its status: what the gateway leans on, by kind, and whether each of it is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from api.routing import Request, Response
from gateway.config import Settings
from gateway.errors import ConfigError, GatewayError, UpstreamAuthFailed, UpstreamRateLimited, UpstreamTimeout
from gateway.store.redis import open_redis
from gateway.store.store import database_url

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway
    from gateway.upstreams.client import Upstream

Word = Literal["ok", "reachable", "down", "timeout", "unknown"]
"""``reachable`` answers, but not well or not to our key; ``unknown`` has not been asked, or is not needed yet."""

_LONGEST_S = 15.0
_TOOLS: dict[str, Word] = {"ok": "ok", "degraded": "reachable", "down": "down"}
_STORE: dict[str, Word] = {"ready": "ok", "unavailable": "down"}
_REDIS: dict[str, Word] = {
    "TimeoutError": "timeout",
    "AuthenticationError": "reachable",
    "NoPermissionError": "reachable",
}
_NOT_STORED = ((b"cache-control", b"no-store"),)


async def list_providers(request: Request) -> Response:
    """List what there is of each kind, and which one serves who names none."""
    gateway = request.gateway
    upstreams = gateway.holder.current.upstreams
    body = {
        "llm": {"default": upstreams.default.name, "available": list(upstreams.upstreams)},
        "tools": {"default": None, "available": [provider.entry for provider in gateway.tools.providers]},
        "store": _only(database_url(gateway.settings).partition(":")[0].partition("+")[0]),
    }
    if gateway.settings.redis_url is not None:
        body["redis"] = _only("redis")
    return Response(msgspec.json.encode(body), headers=_NOT_STORED)


async def providers_status(request: Request) -> Response:
    """Ask every upstream, the store and Redis now; of tools, say what their last call or listing showed."""
    gateway = request.gateway
    upstreams = gateway.holder.current.upstreams.upstreams.values()
    asked: dict[str, Coroutine[Any, Any, Word]] = {f"llm/{upstream.name}": _ask(upstream) for upstream in upstreams}
    asked["store"] = store_word(gateway)
    if gateway.settings.redis_url is not None:
        asked["redis"] = redis_word(gateway.settings.redis_url)
    checks = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
    for provider in gateway.tools.providers:
        checks[f"tools/{provider.entry}"] = _TOOLS.get(provider.health().status, "unknown")
    is_well = not {"down", "timeout"} & set(checks.values())
    body = {"status": "ok" if is_well else "degraded", "checks": checks}
    return Response(msgspec.json.encode(body), headers=_NOT_STORED)


class Needs:
    """What `/readyz` waits for beside the agents (`GATEWAY_READY_NEEDS`), asked at most every ``kept_s`` seconds.

    Whoever asks meanwhile waits for the same answer, for at most ``patience_s``, and has the one before it then: a
    probe without a key costs an upstream next to nothing, and is answered before it is given up.
    """

    def __init__(self, *, kept_s: float = 5.0, patience_s: float = 0.5) -> None:
        self._kept_s, self._patience_s = kept_s, patience_s
        self._asked_at = 0.0
        self._words: dict[str, Word] = {}
        self._asking: asyncio.Task[dict[str, Word]] | None = None

    async def look(self, gateway: Gateway) -> dict[str, Word]:
        """Return how each need is, ``unknown`` before the first answer; of the upstreams, the best of them."""
        needs = gateway.settings.ready_needs
        if needs and self._asking is None and time.monotonic() - self._asked_at >= self._kept_s:
            self._asking = asyncio.create_task(_look(gateway, needs))
            self._asking.add_done_callback(self._settle)
        if self._asking is not None:
            await asyncio.wait((self._asking,), timeout=self._patience_s)
        return {need: self._words.get(need, "unknown") for need in needs}

    def _settle(self, task: asyncio.Task[dict[str, Word]]) -> None:
        self._asking, self._asked_at = None, time.monotonic()
        if not task.cancelled():
            self._words = task.result()


def check_needs(settings: Settings) -> None:
    """Raise `ConfigError` for a need that could never be met."""
    if "redis" in settings.ready_needs and settings.redis_url is None:
        raise ConfigError("GATEWAY_READY_NEEDS names redis, and GATEWAY_REDIS_URL is not set; set it, or leave it out.")


async def store_word(gateway: Gateway) -> Word:
    """Return how the store is; one that nobody has needed yet is unknown."""
    return _STORE.get(await gateway.store.check(), "unknown")


async def redis_word(url: str) -> Word:
    """Ask Redis, over a connection of this question's own."""
    async with open_redis(url) as client:
        try:
            await client.ping()
        except Exception as error:  # noqa: BLE001 - the client raises OSError and classes of its own
            return _REDIS.get(type(error).__name__, "down")
    return "ok"


async def _look(gateway: Gateway, needs: Iterable[str]) -> dict[str, Word]:
    words: dict[str, Word] = {}
    for need in needs:
        if need == "store":
            words[need] = await store_word(gateway)
        elif need == "redis" and gateway.settings.redis_url is not None:
            words[need] = await redis_word(gateway.settings.redis_url)
        elif need == "upstreams":
            upstreams = gateway.holder.current.upstreams.upstreams.values()
            words[need] = _best(await asyncio.gather(*map(_ask, upstreams)))
    return words


def _best(words: Iterable[Word]) -> Word:
    found = set(words)
    order: tuple[Word, ...] = ("ok", "reachable", "timeout")
    return next((word for word in order if word in found), "down")


async def _ask(upstream: Upstream) -> Word:
    """Probe an upstream with our key, and leave what came of it where routing reads it."""
    try:
        async with asyncio.timeout(_LONGEST_S):
            await upstream.probe()
    except TimeoutError:
        upstream.status.failed(f"The upstream '{upstream.name}' did not answer within {_LONGEST_S:g} s.")
        return "timeout"
    except GatewayError as error:
        upstream.status.failed(error.message)
        if isinstance(error, UpstreamAuthFailed | UpstreamRateLimited):
            return "reachable"
        return "timeout" if isinstance(error, UpstreamTimeout) else "down"
    upstream.status.succeeded()
    return "ok"


def _only(name: str) -> dict[str, Any]:
    return {"default": name, "available": [name]}
