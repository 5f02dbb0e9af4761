"""`/metrics` and `/metrics/prometheus`: one set of numbers, as JSON or as the text that `Accept` asks for."""

from __future__ import annotations

import msgspec

from api.routing import Request, Response
from gateway.errors import NotFound

_JSON = "application/json"
_TEXT = "text/plain"
_OPENMETRICS = "application/openmetrics-text"
_HEADERS = ((b"cache-control", b"no-store"), (b"vary", b"accept"))


async def metrics(request: Request) -> Response:
    """Answer JSON, unless the client prefers one of the text formats and they are switched on."""
    offered = (_JSON, _TEXT, _OPENMETRICS) if request.gateway.settings.prometheus_enabled else (_JSON,)
    chosen = negotiate(request.headers.get("accept"), offered)
    if chosen != _JSON:
        return await _text(request, openmetrics=chosen == _OPENMETRICS)
    return Response(msgspec.json.encode(request.gateway.metrics.snapshot()), headers=_HEADERS)


async def prometheus(request: Request) -> Response:
    """Answer the exposition, in the text format that the scraper prefers."""
    if not request.gateway.settings.prometheus_enabled:
        raise NotFound("The Prometheus exposition is switched off; GATEWAY_PROMETHEUS_ENABLED=1 serves it.")
    chosen = negotiate(request.headers.get("accept"), (_TEXT, _OPENMETRICS))
    return await _text(request, openmetrics=chosen == _OPENMETRICS)


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


async def _text(request: Request, *, openmetrics: bool) -> Response:
    body, content_type = await request.gateway.metrics.render(openmetrics=openmetrics)
    return Response(body, content_type=content_type.encode(), headers=_HEADERS)


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
