"""Databases for tests: a SQLite file, or a schema of its own on the PostgreSQL server that stands ready."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

POSTGRES = os.environ.get("GATEWAY_TEST_POSTGRES_URL", "postgresql://127.0.0.1:5432/test")
BACKENDS = ("sqlite", "postgresql")


@contextmanager
def database(backend: str, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty database, and remove it afterwards.

    Without a PostgreSQL server the test is skipped; where ``CI`` is set it fails.
    """
    if backend == "sqlite":
        yield f"sqlite:///{folder / 'store' / 'gateway.db'}"
        return
    schema = f"gateway_test_{secrets.token_hex(6)}"
    try:
        connection = psycopg.connect(POSTGRES, autocommit=True, connect_timeout=30)
    except psycopg.OperationalError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no PostgreSQL at GATEWAY_TEST_POSTGRES_URL ({str(error).strip()[:100]})")
    with connection:
        connection.execute(f"CREATE SCHEMA {schema}")  # type: ignore[arg-type]
        try:
            yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}options={quote(f'-csearch_path={schema}')}"
        finally:
            connection.execute(f"DROP SCHEMA {schema} CASCADE")  # type: ignore[arg-type]
