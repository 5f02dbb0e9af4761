"""`/metrics` and `/metrics/prometheus`: one set of numbers, as JSON or as the text that `Accept` asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from api.routing import Request, Response
from gateway.errors import NotFound, ServiceUnavailable
from gateway.observability.exposition import OPENMETRICS_TYPE, TEXT_TYPE
from gateway.workers.peer import CallFailed

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway

_JSON = "application/json"
_TEXT = "text/plain"
_OPENMETRICS = "application/openmetrics-text"
_HEADERS = ((b"cache-control", b"no-store"), (b"vary", b"accept"))


async def metrics(request: Request) -> Response | None:
    """Answer JSON, unless the client prefers one of the text formats and they are switched on."""
    offered = (_JSON, _TEXT, _OPENMETRICS) if request.gateway.settings.prometheus_enabled else (_JSON,)
    chosen = negotiate(request.headers.get("accept"), offered)
    if chosen != _JSON:
        await _send_text(request, openmetrics=chosen == _OPENMETRICS)
        return None
    return Response(msgspec.json.encode(await _summary(request.gateway)), headers=_HEADERS)


async def prometheus(request: Request) -> None:
    """Answer the exposition, in the text format that the scraper prefers."""
    if not request.gateway.settings.prometheus_enabled:
        raise NotFound("The Prometheus exposition is switched off; GATEWAY_PROMETHEUS_ENABLED=1 serves it.")
    chosen = negotiate(request.headers.get("accept"), (_TEXT, _OPENMETRICS))
    await _send_text(request, openmetrics=chosen == _OPENMETRICS)


def negotiate(accept: str | None, offered: tuple[str, ...]) -> str:
    """Return which of the offered media types the client prefers; the first where it does not say.

    Of equal weights the more exact wish wins, then the order of the offer.
    """
    wishes = [_wish(part) for part in accept.split(",")] if accept else []
    best, best_rank = offered[0], (0.0, 3)  # a weight of 0 is a refusal
    for media in offered:
        matches = [(exactness, weight) for pattern, weight in wishes if (exactness := _exactness(pattern, media)) >= 0]
        if matches:
            exactness, weight = max(matches)
            if (weight, exactness) > best_rank:
                best, best_rank = media, (weight, exactness)
    return best


async def _send_text(request: Request, *, openmetrics: bool) -> None:
    """Send the exposition as it is written: it is never held as a whole, and a slow scraper slows its writing."""
    gateway = request.gateway
    if gateway.workers.is_alone:
        pieces = gateway.metrics.render(openmetrics=openmetrics)
    else:
        pieces = _single(await _ask(gateway, "metrics.render", openmetrics))
    content_type = (b"content-type", OPENMETRICS_TYPE if openmetrics else TEXT_TYPE)
    await request.send({"type": "http.response.start", "status": 200, "headers": [content_type, *_HEADERS]})
    async for piece in pieces:
        await request.send({"type": "http.response.body", "body": piece, "more_body": True})
    await request.send({"type": "http.response.body", "body": b""})


async def _summary(gateway: Gateway) -> Any:
    if gateway.workers.is_alone:
        return gateway.metrics.snapshot()
    return await _ask(gateway, "metrics.summary", None)


async def _ask(gateway: Gateway, name: str, value: Any) -> Any:
    """Return the numbers of all workers, which the supervisor adds up and writes."""
    try:
        return await gateway.workers.ask_supervisor(name, value, timeout_s=10)
    except CallFailed as error:
        raise ServiceUnavailable(f"The metrics of the other workers cannot be had: {error}.") from error


async def _single(piece: bytes) -> AsyncIterator[bytes]:
    yield piece


def _wish(part: str) -> tuple[str, float]:
    media, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return media, float(parameter[2:])
            except ValueError:
                return media, 0.0
    return media, 1.0


def _exactness(pattern: str, media: str) -> int:
    if pattern == media:
        return 2
    if pattern == f"{media.partition('/')[0]}/*":
        return 1
    return 0 if pattern == "*/*" else -1
