"""The tables of the store: one MetaData, and per room a Schema with the steps that bring older databases up to it.

Importing this module imports SQLAlchemy, so only modules that the store loads for itself do so at their top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import BigInteger, Connection, Integer, MetaData, Table

METADATA = MetaData()
"""Every table of the gateway; a room's own module adds its own."""

WHOLE = BigInteger().with_variant(Integer, "sqlite")
"""Numbers up to 64 bits; as a primary key, SQLite counts it up only under the name INTEGER."""

Step = Callable[[Connection], None]


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one room, and how an older database gets them.

    A new database gets ``tables`` as they stand, at version ``1 + len(steps)``. Step *n* (from 0) brings version
    *n + 1* to *n + 2*: it states its own DDL and never refers to ``tables``, which are those of today. All steps of a
    start run in one transaction that one process at a time holds.
    """

    name: str
    tables: tuple[Table, ...]
    steps: tuple[Step, ...] = ()

    @property
    def version(self) -> int:
        """The version that this code reads and writes."""
        return 1 + len(self.steps)
