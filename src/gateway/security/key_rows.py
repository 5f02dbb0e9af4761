"""The table of API keys made at run time. Importing this imports SQLAlchemy."""

from __future__ import annotations

import msgspec
from sqlalchemy import BigInteger, Column, Float, Index, String, Table, Text, func, insert, select, update

from gateway.security.stored import KeyOptions, StoredKey
from gateway.store.connection import StoreConnection
from gateway.store.schema import METADATA, Schema

KEYS = Table(
    "gateway_api_keys",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("digest", String(128), nullable=False, unique=True),
    Column("options", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(256), nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("previous_digest", String(128)),
    Column("previous_until", Float),
    Column("changed", BigInteger, nullable=False),
    Index("gateway_api_keys_by_change", "changed"),
)
SCHEMA = Schema("api_keys", (KEYS,))


async def revision(connection: StoreConnection) -> int:
    """Return a number that grows with every change of any key."""
    return await connection.scalar(select(func.coalesce(func.max(KEYS.c.changed), 0))) or 0


async def load(connection: StoreConnection) -> tuple[StoredKey, ...]:
    """Return every key, the revoked ones too, by id."""
    found = await connection.execute(select(KEYS).order_by(KEYS.c.id))
    return tuple(
        StoredKey(
            options=msgspec.json.decode(row["options"], type=KeyOptions),
            **{name: row[name] for name in _PLAIN},
        )
        for row in found.mappings()
    )


async def find_locked(connection: StoreConnection, key_id: str) -> StoredKey | None:
    """Return one key, that nobody else changes until this transaction ends."""
    if connection.backend == "postgresql":  # SQLite has one writer at a time anyway
        await connection.exec_driver_sql("LOCK TABLE gateway_api_keys IN SHARE ROW EXCLUSIVE MODE")
    return next((key for key in await load(connection) if key.id == key_id), None)


async def write(connection: StoreConnection, key: StoredKey, *, new: bool) -> None:
    """Write a key that `find_locked` looked for, and let every process know."""
    values = {name: getattr(key, name) for name in _PLAIN}
    values["options"] = msgspec.json.encode(key.options).decode()
    values["changed"] = await revision(connection) + 1
    if new:
        await connection.execute(insert(KEYS).values(values))
    else:
        await connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(values))


_PLAIN = (
    "id",
    "digest",
    "created_at",
    "created_by",
    "expires_at",
    "revoked_at",
    "previous_digest",
    "previous_until",
)
