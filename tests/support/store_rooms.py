"""A room's tables as the store finds them, in an older and a newer version of the code."""

from __future__ import annotations

from sqlalchemy import Column, Connection, MetaData, String, Table

from gateway.store import schema
from gateway.store.schema import WHOLE, Schema

NOTES = Table(
    "test_notes", schema.METADATA, Column("id", WHOLE, primary_key=True), Column("text", String(20), unique=True)
)
SCHEMA = Schema("notes", (NOTES,))

_later = MetaData()
LATER_NOTES = Table(
    "test_notes",
    _later,
    Column("id", WHOLE, primary_key=True),
    Column("text", String(20), unique=True),
    Column("author", String(20)),
)


def add_author(connection: Connection) -> None:
    """The step from version 1 to 2."""
    connection.exec_driver_sql("ALTER TABLE test_notes ADD COLUMN author VARCHAR(20)")


class later:
    """The same room, one version on."""

    SCHEMA = Schema("notes", (LATER_NOTES,), (add_author,))
