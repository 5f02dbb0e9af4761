"""The store's engine: SQLite or PostgreSQL through SQLAlchemy Core, its pragmas, its migrations.

`gateway.store.store` imports this module in a thread when the store is first needed, and with it SQLAlchemy.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Engine, Integer, String, Table, create_engine, event, insert, select, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from gateway.errors import ConfigError, StoreUnavailable
from gateway.store.connection import POSTGRESQL_CONNECTIONS, SQLITE_READERS, WAIT_S, Database
from gateway.store.schema import METADATA, Schema

_BUSY_MS = 5_000
_LOCK = 0x67617465
"""PostgreSQL's advisory lock that one starting process at a time holds."""

_VERSIONS = Table(
    "gateway_schemas",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
)


async def open_database(url: str, modules: Sequence[str]) -> Database:
    """Connect, and bring the schema up to the code's; raises `StoreUnavailable` or `ConfigError`."""
    schemas = await asyncio.to_thread(_load, modules)
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            "GATEWAY_DATABASE_URL cannot be read as an address; see docs/references/settings.md."
        ) from error
    make = _sqlite if parsed.get_backend_name() == "sqlite" else _postgresql
    database = Database(await asyncio.to_thread(make, parsed))
    try:
        if database.backend == "sqlite":
            await asyncio.to_thread(_use_wal, database.engine)
        if not await _is_current(database, schemas):
            async with database.connect(read_only=False) as connection:
                await connection.run(_migrate, schemas)
    except BaseException:
        await database.aclose()
        raise
    return database


def _load(modules: Sequence[str]) -> list[Schema]:
    schemas: list[Schema] = [importlib.import_module(name).SCHEMA for name in modules]
    return schemas


def _sqlite(url: URL) -> Engine:
    path = url.database
    assert path, "checked by `database_url`"
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what is billed to whom is nobody else's business
    except OSError as error:
        raise StoreUnavailable(
            "The state folder cannot be written; set GATEWAY_STATE_DIR to a folder that the gateway may write."
        ) from error
    engine = create_engine(
        url,
        connect_args={"isolation_level": None},
        pool_size=SQLITE_READERS + 1,
        max_overflow=0,
        pool_timeout=WAIT_S,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # The driver's own BEGIN comes too late: a read that becomes a write in the middle cannot wait for its turn.
        read_only = connection.get_execution_options().get("gateway_read_only")
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: URL) -> Engine:
    return create_engine(
        url,
        pool_size=POSTGRESQL_CONNECTIONS,
        max_overflow=0,
        pool_pre_ping=True,
        pool_timeout=WAIT_S,
        hide_parameters=True,
        connect_args={
            "connect_timeout": int(WAIT_S),
            "application_name": "agent-gateway",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,
        }
        | dict(url.query),
    )


def _use_wal(engine: Engine) -> None:
    """Readers and one writer do not wait for each other; the mode stays in the file."""
    ends = time.monotonic() + WAIT_S
    while True:
        try:
            connection = engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA journal_mode = WAL")  # SQLAlchemy would begin a transaction first
            finally:
                connection.close()
            return
        except (DBAPIError, sqlite3.Error) as error:
            # Another process may be at it; SQLite does not wait here as it does elsewhere.
            reason = error.orig if isinstance(error, DBAPIError) else error
            if time.monotonic() > ends or not isinstance(reason, sqlite3.OperationalError):
                raise StoreUnavailable(f"The database file cannot be used: {_reason(error)}.") from error
        time.sleep(0.05)


async def _is_current(database: Database, schemas: Sequence[Schema]) -> bool:
    try:
        async with database.connect(read_only=True) as connection:
            found = await connection.run(_versions)
    except (DBAPIError, StoreUnavailable):
        return False  # no such table yet; where it is worse, `_migrate` says so
    return all(found.get(schema.name) == schema.version for schema in schemas)


def _migrate(connection: Connection, schemas: Sequence[Schema]) -> None:
    """Create and change what is missing; every process that starts comes here one after the other."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    METADATA.create_all(connection, tables=[_VERSIONS])
    found = _versions(connection)
    for schema in schemas:
        version = found.get(schema.name)
        if version is None:
            METADATA.create_all(connection, tables=schema.tables)
            connection.execute(insert(_VERSIONS).values(name=schema.name, version=schema.version))
            continue
        if version > schema.version:
            raise ConfigError(
                f"The database was made by a newer gateway ('{schema.name}' has version {version}, this one knows "
                f"{schema.version}). Use that gateway, or another GATEWAY_DATABASE_URL or GATEWAY_STATE_DIR."
            )
        for step in schema.steps[version - 1 :]:
            step(connection)
        connection.execute(update(_VERSIONS).where(_VERSIONS.c.name == schema.name).values(version=schema.version))


def _versions(connection: Connection) -> dict[str, int]:
    return {row.name: row.version for row in connection.execute(select(_VERSIONS))}


def _reason(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).partition("\n")[0][:200]
