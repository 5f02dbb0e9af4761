"""Store: the one SQL database of the gateway, opened when somebody first needs it.

SQLite in the state folder, or PostgreSQL by `GATEWAY_DATABASE_URL`. SQLAlchemy takes 17 MB and a quarter of a second:
it is imported in a thread, at the first use, and the gateway serves meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from gateway.config import Settings
from gateway.errors import ConfigError, GatewayError, StoreUnavailable
from gateway.observability.logs import log_event

if TYPE_CHECKING:  # importing SQLAlchemy is what this module puts off
    from gateway.store.connection import Database, StoreConnection

Status = Literal["idle", "opening", "ready", "unavailable"]

DATABASE_FILE = "gateway.db"
_LONGEST_REASON = 500
_AGAIN_S = 1.0
"""Seconds after a failed opening in which nobody tries again."""
_PROBE_S = 2.0
_PROBE_KEPT_S = 1.0

_log = logging.getLogger("gateway.store")


def database_url(settings: Settings) -> str:
    """Return the URL of the store as SQLAlchemy writes it; raise `ConfigError` for one that cannot be used."""
    given = settings.database_url
    if given is None:
        return f"sqlite:///{settings.state_folder() / DATABASE_FILE}"
    try:
        scheme = urlsplit(given).scheme
    except ValueError:
        scheme = ""
    drivers = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "sqlite": "sqlite"}
    driver = drivers.get(scheme.partition("+")[0])
    has_place = driver != "sqlite" or _sqlite_file(given) is not None
    if driver is None or scheme not in (*drivers, *drivers.values()) or not has_place:
        raise ConfigError(
            "GATEWAY_DATABASE_URL is not accepted; write postgresql://USER:PASSWORD@HOST/DATABASE or "
            "sqlite:////PATH/gateway.db."
        )
    return f"{driver}{given[len(scheme) :]}"


def _sqlite_file(url: str) -> Path | None:
    """Return the file that a URL names; None where the database would be in memory, which threads cannot share."""
    name = url.partition("?")[0].partition("///")[2]
    return Path(name) if name not in ("", ":memory:") else None


class Store:
    """One database; safe to use from many tasks of one event loop. Close it with ``async with``.

    ``modules`` are the dotted names of the rooms' modules that hold a `Schema` as ``SCHEMA``.
    """

    def __init__(self, url: str, modules: Sequence[str]) -> None:
        self._url = url
        self._modules = tuple(modules)
        self._database: Database | None = None
        self._opening: asyncio.Task[Database] | None = None
        self._failed: tuple[float, GatewayError] | None = None
        self._reachable = True
        self._probed = 0.0
        self._probe: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def is_shared(self) -> bool:
        """Whether other machines may use it, too: it is a server."""
        return self._url.startswith("postgresql")

    @property
    def path(self) -> Path | None:
        """The file of a SQLite store; None for a server."""
        return None if self.is_shared else _sqlite_file(self._url)

    @property
    def status(self) -> Status:
        """``idle`` until somebody needs it, then ``opening``, ``ready`` or ``unavailable``."""
        if self._database is None:
            if self._failed is not None:
                return "unavailable"
            return "idle" if self._opening is None else "opening"
        return "ready" if self._reachable else "unavailable"

    async def open(self) -> None:
        """Open the store if it is not: file, schema, migrations. The rooms' modules are imported then.

        Raises `StoreUnavailable`; `ConfigError` where a newer gateway made the database.
        """
        await self._open()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[StoreConnection]:
        """Write: commit when the block ends, roll back when it raises.

        On SQLite one writer at a time has the database, from here on. Raises `StoreUnavailable` for whatever fails
        because of the database, in the block too; a violated constraint stays SQLAlchemy's ``IntegrityError``.
        """
        async with self._connect(read_only=False) as connection:
            yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[StoreConnection]:
        """Read one consistent state of the database; raises as `transaction` does."""
        async with self._connect(read_only=True) as connection:
            yield connection

    async def check(self) -> Status:
        """Return the status, asked of the database itself at most once a second; never raises, never takes 2 s."""
        if self._database is not None and self._probe is None and time.monotonic() - self._probed >= _PROBE_KEPT_S:
            self._probe = asyncio.create_task(self._ask())
        if self._probe is not None:
            await asyncio.wait((self._probe,))
        return self.status

    async def aclose(self) -> None:
        """Close every connection; whoever uses the store later is refused."""
        self._closed = True
        for task in (self._opening, self._probe):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        if self._database is not None:
            database, self._database = self._database, None
            await database.aclose()

    @asynccontextmanager
    async def _connect(self, *, read_only: bool) -> AsyncIterator[StoreConnection]:
        database = await self._open()
        try:
            async with database.connect(read_only=read_only) as connection:
                yield connection
        except StoreUnavailable as error:
            self._note(reachable=False, error=error)
            raise
        self._note(reachable=True)

    async def _open(self) -> Database:
        if self._database is not None:
            return self._database
        if self._closed:
            raise StoreUnavailable("The store is closed: the gateway is shutting down.")
        if self._opening is None:
            if self._failed is not None and time.monotonic() - self._failed[0] < _AGAIN_S:
                failed = self._failed[1]
                raise type(failed)(failed.message, retry_after_s=failed.retry_after_s) from failed
            self._opening = asyncio.create_task(self._open_now())
            self._opening.add_done_callback(_seen)
        return await asyncio.shield(self._opening)

    async def _open_now(self) -> Database:
        started = time.monotonic()
        try:
            sql = await asyncio.to_thread(importlib.import_module, "gateway.store.sql")
            opened: Database = await sql.open_database(self._url, self._modules)
        except GatewayError as error:
            if self._failed is None:
                log_event(
                    _log,
                    "store.open.failed",
                    level=logging.ERROR,
                    message=error.message,
                    reason=why_unavailable(error),
                    exc_info=error.__cause__,
                )
            self._failed = (time.monotonic(), error)
            raise
        finally:
            self._opening = None
        self._failed = None
        self._database = opened
        log_event(
            _log, "store.opened", backend=opened.backend, duration_ms=round((time.monotonic() - started) * 1000, 1)
        )
        return opened

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_PROBE_S), self.reading() as connection:
                await connection.exec_driver_sql("SELECT 1")
        except (GatewayError, TimeoutError) as error:
            self._note(reachable=False, error=error)
        finally:
            self._probed = time.monotonic()
            self._probe = None

    def _note(self, *, reachable: bool, error: BaseException | None = None) -> None:
        if reachable == self._reachable:
            return
        self._reachable = reachable
        if reachable:
            log_event(_log, "store.reachable")
        else:
            cause = error and (error.__cause__ or error)
            log_event(_log, "store.unreachable", level=logging.ERROR, reason=why_unavailable(error), exc_info=cause)


def why_unavailable(error: BaseException | None) -> str | None:
    """Return the driver's words for why the database cannot be had: they name address and user, and no row."""
    original = getattr(error.__cause__, "orig", None) if error is not None else None
    return None if original is None else " ".join(str(original).split())[:_LONGEST_REASON]


def _seen(task: asyncio.Task[Database]) -> None:
    """Whoever asked may be gone by now: a failure that nobody heard of is in the log all the same."""
    if not task.cancelled():
        task.exception()
