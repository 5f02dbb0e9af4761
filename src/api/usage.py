"""GET /usage: what was used and what it cost, from the ledger, by whatever it is grouped by."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from uuid import UUID

import msgspec

from api.routing import Request, Response
from gateway.errors import InvalidRequest, NotFound, PermissionDenied
from gateway.usage.prices import usd
from gateway.usage.question import GROUP_NAMES, TOKEN_NAMES, Question, iso

if TYPE_CHECKING:  # the rows' module imports SQLAlchemy
    from gateway.usage.rows import FullRow

_DEFAULT_DAYS = 30
_MOST_GROUPS = 1_000
_FILTERS = tuple(name for name in GROUP_NAMES if name != "day")
_KNOWN = ("from", "to", "group_by", "limit", "offset", *_FILTERS)
_HEADERS = ((b"cache-control", b"no-store"),)


async def read_usage(request: Request) -> Response:
    """Answer sums over a time, or single rows of it; a key without the scope ``admin`` sees its own."""
    ledger = request.gateway.ledger
    if ledger is None:
        raise NotFound("Usage is not kept here; the operator switches it on with GATEWAY_USAGE_LEDGER=1.")
    given = _parameters(request)
    only = {name: given[name] for name in _FILTERS if name in given}
    if not request.caller.is_admin:
        own = request.caller.key_id
        if only.setdefault("key", own) != own:
            raise PermissionDenied("A key sees its own usage; that of others needs the scope 'admin'.")
    now = datetime.now(UTC)
    start = _moment(given, "from") or datetime.combine(now.date() - timedelta(days=_DEFAULT_DAYS - 1), time.min, UTC)
    end = _moment(given, "to") or now + timedelta(seconds=1)
    group_by = _groups(given.get("group_by", ""))
    offset = _number(given, "offset", 0, 10**9)
    question = Question(
        from_ms=_milliseconds(start),
        to_ms=_milliseconds(end),
        group_by=group_by,
        only=only,
        limit=_number(given, "limit", 100, _MOST_GROUPS),
        offset=offset,
    )
    data: list[dict[str, Any]]
    if group_by == ("none",):
        listed = await ledger.list_rows(question)
        data, has_more = [_listed(row) for row in listed.rows], listed.has_more
    else:
        totals = await ledger.ask(question)
        data, has_more = [total.record() for total in totals.groups], totals.has_more
    body = {
        "object": "list",
        "from": start.isoformat(),
        "to": end.isoformat(),
        "group_by": group_by,
        "data": data,
        "has_more": has_more,
        "next_offset": offset + len(data) if has_more else None,
    }
    return Response(msgspec.json.encode(body), headers=_HEADERS)


def _listed(row: FullRow) -> dict[str, Any]:
    return {
        "at": iso(row.at_ms),
        "key": row.key_id,
        "namespace": row.namespace,
        "end_user": row.end_user,
        "model": row.model,
        "agent": row.agent,
        "upstream": row.upstream,
        "upstream_model": row.upstream_model,
        "path": row.path,
        "run_id": str(UUID(row.run_id)),
        "request_id": row.request_id,
        "requests": row.runs,
        "model_calls": row.calls,
        "status": row.status,
        "error_code": row.error_code,
        "duration_ms": None if row.duration_ms is None else round(row.duration_ms, 3),
        "cached": row.cached,
        **{name: getattr(row, name) for name in TOKEN_NAMES},
        "estimated": row.estimated,
        "cost_usd": None if row.cost is None else usd(row.cost),
        "cost_reported": row.cost_reported,
        "price_version": row.price_version,
        "byok": row.byok,
    }


def _parameters(request: Request) -> dict[str, str]:
    text = request.scope.get("query_string", b"").decode("latin-1")
    pairs = parse_qsl(text, keep_blank_values=True, errors="replace")
    given = dict(pairs)
    unknown = next((name for name in given if name not in _KNOWN), None)
    if unknown is not None or len(given) < len(pairs):
        raise InvalidRequest(
            f"'{unknown[:64]}' is no parameter; there are {', '.join(_KNOWN)}."
            if unknown is not None
            else "A parameter stands there twice; group by several things as group_by=key,model."
        )
    return given


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("none",):
        return names
    if len(set(names)) < len(names) or not set(names) <= set(GROUP_NAMES):
        raise InvalidRequest(
            f"group_by takes {', '.join(GROUP_NAMES)}, each once, or none for single calls.", param="group_by"
        )
    return names


def _moment(given: dict[str, str], name: str) -> datetime | None:
    """Read a day (its first second) or a moment; UTC where no zone is named."""
    text = given.get(name)
    if text is None:
        return None
    try:
        if len(text) <= 10:
            return datetime.combine(date.fromisoformat(text), time.min, UTC)
        found = datetime.fromisoformat(text.replace(" ", "+"))  # a + of the zone, as it stands in a query
        return found.astimezone(UTC) if found.tzinfo is not None else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"'{name}' is no time; write 2030-12-31 or 2030-12-31T12:00:00Z.", param=name) from error


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _number(given: dict[str, str], name: str, default: int, most: int) -> int:
    text = given.get(name, str(default))
    if (
        not text.isascii()
        or not text.isdigit()
        or len(text) > 10
        or int(text) > most
        or (name == "limit" and text == "0")
    ):
        raise InvalidRequest(f"'{name}' takes a whole number up to {most}.", param=name)
    return int(text)
