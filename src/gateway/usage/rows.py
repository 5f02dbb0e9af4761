"""The ledger's table: how entries become rows, how rows get in, what is asked of them.

A row counts ``runs`` and ``calls``, so that sums need no case: the run of an agent is a row with ``runs`` 1 and no
tokens, each of its model calls a row with ``calls`` 1; a relayed call is both in one. Importing this
imports SQLAlchemy; what takes a `Connection` runs in the store's threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    RowMapping,
    Select,
    SmallInteger,
    String,
    Table,
    case,
    delete,
    false,
    func,
    select,
    text,
)
from sqlalchemy.sql import ColumnElement

from gateway.store.schema import METADATA, WHOLE, Schema
from gateway.usage.ledger import Entry
from gateway.usage.question import TOKEN_NAMES, Question, Total, Totals

_TEXT = 256
_DAY_MS = 86_400_000
_HALF = 10**9
"""Sums of picodollars pass 64 bits at nine million dollars: their two halves are summed apart."""

_AT_ONCE = 50
"""Rows of one statement in SQLite: the driver gives way to other threads once for them, not once for each."""
_PIECE = 500
"""Rows of one statement in PostgreSQL; as JSON they are 0.3 ms of the interpreter's time."""

_ZERO = text("0")

USAGE = Table(
    "gateway_usage",
    METADATA,
    Column("id", WHOLE, primary_key=True, autoincrement=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("tenant", String(_TEXT), nullable=False),
    Column("namespace", String(_TEXT), nullable=False),
    Column("key_id", String(_TEXT), nullable=False),
    Column("end_user", String(_TEXT)),
    Column("model", String(_TEXT), nullable=False),
    Column("agent", String(_TEXT)),
    Column("upstream", String(_TEXT)),
    Column("upstream_model", String(_TEXT)),
    Column("path", String(_TEXT), nullable=False),
    Column("run_id", String(32), nullable=False),
    Column("request_id", String(_TEXT), nullable=False),
    Column("runs", SmallInteger, nullable=False),
    Column("calls", SmallInteger, nullable=False),
    Column("status", String(16)),
    Column("error_code", String(_TEXT)),
    Column("duration_ms", Float),
    Column("cached", Boolean, nullable=False, server_default=false()),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cached_input_tokens", BigInteger, nullable=False),
    Column("cache_write_tokens", BigInteger, nullable=False, server_default=_ZERO),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("audio_input_tokens", BigInteger, nullable=False, server_default=_ZERO),
    Column("audio_output_tokens", BigInteger, nullable=False, server_default=_ZERO),
    Column("cost", BigInteger),
    Column("cost_reported", Boolean, nullable=False, server_default=false()),
    Column("estimated", Boolean, nullable=False, server_default=false()),
    Column("price_version", String(64)),
    Column("byok", Boolean, nullable=False, server_default=false()),
    Index("gateway_usage_by_time", "at_ms"),  # every further index costs each row more than its own columns do
)


def _add_byok(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE gateway_usage ADD COLUMN byok BOOLEAN NOT NULL DEFAULT false"))


SCHEMA = Schema("usage", (USAGE,), (_add_byok,))


class Row(msgspec.Struct, gc=False):
    """A row of which the columns that are seldom needed have the table's own defaults."""

    at_ms: int
    tenant: str
    namespace: str
    key_id: str
    model: str
    upstream: str | None
    upstream_model: str | None
    path: str
    run_id: str
    request_id: str
    runs: int
    calls: int
    status: str | None
    duration_ms: float | None
    input_tokens: int
    output_tokens: int
    cached_input_tokens: int
    reasoning_tokens: int
    cost: int | None
    price_version: str | None


class FullRow(Row, gc=False):
    """A row with every column."""

    end_user: str | None
    agent: str | None
    error_code: str | None
    cached: bool
    cache_write_tokens: int
    audio_input_tokens: int
    audio_output_tokens: int
    cost_reported: bool
    estimated: bool
    byok: bool


class _Statements:
    """How rows of one kind get in, past SQLAlchemy's own work for each value."""

    def __init__(self, kind: type[Row]) -> None:
        names = ", ".join(kind.__struct_fields__)
        one = f"({', '.join('?' for _ in kind.__struct_fields__)})"
        self.one = f"INSERT INTO gateway_usage ({names}) VALUES {one}"
        self.many = f"{self.one}{f', {one}' * (_AT_ONCE - 1)}"
        types = ", ".join(f"{name} {USAGE.c[name].type.compile()}" for name in kind.__struct_fields__)
        self.json = f"INSERT INTO gateway_usage ({names}) SELECT {names} FROM json_to_recordset(%s::json) AS t({types})"


_STATEMENTS = {kind: _Statements(kind) for kind in (Row, FullRow)}

GROUPS: dict[str, ColumnElement[Any]] = {
    "key": USAGE.c.key_id,
    "model": USAGE.c.model,
    "agent": USAGE.c.agent,
    "upstream": USAGE.c.upstream,
    "end_user": USAGE.c.end_user,
    "namespace": USAGE.c.namespace,
    "day": USAGE.c.at_ms // _DAY_MS,
}
"""What usage is grouped and filtered by; ``day`` counts from 1970 in UTC."""


class Rows(msgspec.Struct, frozen=True):
    """One page of single rows."""

    rows: list[FullRow]
    has_more: bool


def add_rows(rows: list[Row], entries: Sequence[Entry]) -> None:
    """Append the rows of entries."""
    rows.extend(map(_row, entries))


def insert(connection: Connection, rows: Sequence[Row]) -> None:
    """Write rows."""
    cursor = connection.connection.cursor()
    is_sqlite = connection.dialect.name == "sqlite"
    for kind, statements in _STATEMENTS.items():
        chosen = [row for row in rows if type(row) is kind]
        if not is_sqlite:
            for start in range(0, len(chosen), _PIECE):
                cursor.execute(statements.json, (msgspec.json.encode(chosen[start : start + _PIECE]).decode(),))
            continue
        values = msgspec.structs.astuple
        whole = len(chosen) - len(chosen) % _AT_ONCE
        for start in range(0, whole, _AT_ONCE):
            flat: list[Any] = []
            for row in chosen[start : start + _AT_ONCE]:
                flat += values(row)
            cursor.execute(statements.many, flat)
        cursor.executemany(statements.one, [values(row) for row in chosen[whole:]])
    cursor.close()


def prune(connection: Connection, before_ms: int, most: int) -> int:
    """Delete up to ``most`` rows older than a moment; return how many."""
    old = select(USAGE.c.id).where(USAGE.c.at_ms < before_ms).limit(most)
    return connection.execute(delete(USAGE).where(USAGE.c.id.in_(old))).rowcount


def ask(connection: Connection, question: Question) -> Totals:
    """Return one page of sums."""
    keys = [GROUPS[name].label(f"by_{name}") for name in question.group_by]
    columns = USAGE.c
    sums = [
        func.coalesce(func.sum(columns.runs), 0).label("requests"),
        func.coalesce(func.sum(case((columns.status == "failure", columns.runs), else_=0)), 0).label("failures"),
        func.coalesce(func.sum(case((columns.cached, columns.runs), else_=0)), 0).label("cached"),
        func.coalesce(func.sum(columns.calls), 0).label("model_calls"),
        func.coalesce(func.sum(case((columns.cost.is_(None), columns.calls), else_=0)), 0).label("calls_without_cost"),
        func.coalesce(func.sum(case((columns.estimated, columns.calls), else_=0)), 0).label("estimated_calls"),
        func.coalesce(func.sum(case((columns.byok, columns.calls), else_=0)), 0).label("byok_calls"),
        *_halves("cost", columns.cost),
        *_halves("byok_cost", case((columns.byok, columns.cost), else_=0)),
        *(func.coalesce(func.sum(columns[name]), 0).label(name) for name in TOKEN_NAMES),
        func.max(columns.at_ms).label("last_ms"),
    ]
    query = _narrowed(select(*keys, *sums), question)
    if keys:
        query = query.group_by(*keys).order_by(*(key.nulls_last() for key in keys))
    found = connection.execute(query.limit(question.limit + 1).offset(question.offset)).mappings().all()
    groups = [
        Total(
            group={name: row[f"by_{name}"] for name in question.group_by},
            cost=_whole(row, "cost"),
            byok_cost=_whole(row, "byok_cost"),
            tokens={name: int(row[name]) for name in TOKEN_NAMES},
            last_ms=row["last_ms"],
            **{name: int(row[name]) for name in _COUNTS},
        )
        for row in found[: question.limit]
    ]
    return Totals(groups, len(found) > question.limit)


def list_rows(connection: Connection, question: Question) -> Rows:
    """Return one page of single rows, the latest first."""
    query = _narrowed(select(*(USAGE.c[name] for name in FullRow.__struct_fields__)), question)
    query = query.order_by(USAGE.c.at_ms.desc(), USAGE.c.id.desc())
    found = connection.execute(query.limit(question.limit + 1).offset(question.offset)).mappings().all()
    return Rows([FullRow(**row) for row in found[: question.limit]], len(found) > question.limit)


def _narrowed(query: Select[Any], question: Question) -> Select[Any]:
    query = query.where(USAGE.c.at_ms >= question.from_ms, USAGE.c.at_ms < question.to_ms)
    return query.where(*(GROUPS[name] == _text(value) for name, value in question.only.items()))


_COUNTS = ("requests", "failures", "cached", "model_calls", "calls_without_cost", "estimated_calls", "byok_calls")


def _halves(name: str, cost: ColumnElement[Any]) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    return (
        func.coalesce(func.sum(cost // _HALF), 0).label(f"{name}_high"),
        func.coalesce(func.sum(cost % _HALF), 0).label(f"{name}_low"),
    )


def _whole(row: RowMapping, name: str) -> int:
    return int(row[f"{name}_high"]) * _HALF + int(row[f"{name}_low"])


def _row(entry: Entry) -> Row:
    principal, usage, outcome = entry.principal, entry.usage, entry.outcome
    common = (
        int(entry.at * 1000),
        principal.tenant,
        principal.namespace,
        principal.key_id,
        _text(entry.model),
        entry.upstream,
        None if entry.upstream_model is None else _text(entry.upstream_model),
        entry.path,
        f"{entry.id.int:032x}",
        entry.request_id,
        0 if outcome is None else 1,
        0 if entry.upstream is None else 1,
        outcome,
        None if outcome is None else entry.seconds * 1000,
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.reasoning_tokens,
        usage.cost,
        entry.price_version,
    )
    cached = usage.cached if outcome is None else entry.cached
    if (
        entry.end_user is None
        and entry.agent is None
        and entry.error_code is None
        and not (cached or usage.cost_reported or usage.estimated or entry.byok)
        and not (usage.cache_write_tokens or usage.audio_input_tokens or usage.audio_output_tokens)
    ):
        return Row(*common)
    return FullRow(
        *common,
        None if entry.end_user is None else _text(entry.end_user),
        None if entry.agent is None else _text(entry.agent),
        entry.error_code,
        cached,
        usage.cache_write_tokens,
        usage.audio_input_tokens,
        usage.audio_output_tokens,
        usage.cost_reported,
        usage.estimated,
        entry.byok,
    )


@lru_cache(maxsize=1_024)
def _text(value: str) -> str:
    """Return what fits a column; PostgreSQL takes no NUL, and UTF-8 no half of a pair."""
    return value[:_TEXT].replace("\0", "").encode("utf-8", "replace").decode()
