"""The table of the limits in the store; imported by the store, and with it SQLAlchemy, when it is first needed."""

from __future__ import annotations

from sqlalchemy import Column, String, Table, Text

from gateway.store.schema import METADATA, WHOLE, Schema

COUNTERS = Table(
    "limit_counters",
    METADATA,
    Column("key", String(255), primary_key=True),
    Column("state", Text, nullable=False),
    Column("idle_at", WHOLE, nullable=False, index=True),
)
"""``state`` is that of `gateway.limits.book`; ``idle_at`` (ms) is when nothing of it counts any more."""

SCHEMA = Schema("limits", tables=(COUNTERS,))
