"""Connections: SQLAlchemy Core in a few threads of the store's own, behind calls that a task awaits.

A transaction has one connection, whose statements run one after the other. A task that is cancelled leaves at once: the
statement under way is stopped, the transaction rolled back and the connection given back behind it, and only then does
its turn go to the next.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, Executable, Result, ScalarResult
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gateway.errors import StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")

WAIT_S = 5.0
"""Seconds to wait for a connection: to the server, or for one that others use."""

SQLITE_READERS = 2
POSTGRESQL_CONNECTIONS = 5
_STOP_S = 2.0
"""Seconds that PostgreSQL has to stop a statement; then its connection is cut."""


class StoreConnection:
    """One transaction; `Database.connect` makes it and ends it."""

    def __init__(self, engine: Engine, threads: ThreadPoolExecutor, *, read_only: bool) -> None:
        self.backend = engine.dialect.name
        self._engine = engine
        self._threads = threads
        self._read_only = read_only
        self._connection: Connection | None = None
        self._in_use = threading.Lock()

    async def run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function with SQLAlchemy's own connection, in the thread: several statements for the price of one."""
        return await self._submit(lambda: work(self._begun(), *args, **kwargs))

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> Result[Any]:
        """Run a statement; every row of its answer is there."""
        return await self.run(lambda connection: _fetched(connection.execute(statement, parameters)))

    async def exec_driver_sql(self, statement: str) -> Result[Any]:
        """Run SQL as it stands; every row of its answer is there."""
        return await self.run(lambda connection: _fetched(connection.exec_driver_sql(statement)))

    async def scalar(self, statement: Executable) -> Any:
        """Return the first column of the first row; None without one."""
        return await self.run(lambda connection: connection.scalar(statement))

    async def scalars(self, statement: Executable) -> ScalarResult[Any]:
        """Return the first column of every row."""
        return (await self.execute(statement)).scalars()

    async def begin(self) -> None:
        """Begin now; else the first statement does."""
        await self._submit(self._begun)

    def end(self, *, commit: bool) -> asyncio.Future[None]:
        """End the transaction after the statement under way, and give the connection back."""
        return asyncio.wrap_future(self._threads.submit(self._end, commit=commit))

    def abandon(self) -> asyncio.Future[None]:
        """Stop the statement under way, roll back, and give the connection back."""
        return asyncio.wrap_future(self._threads.submit(self._abandon))

    async def _submit(self, work: Callable[[], T]) -> T:
        def alone() -> T:
            with self._in_use:
                return work()

        try:
            future: Future[T] = self._threads.submit(alone)
        except RuntimeError as error:
            raise StoreUnavailable("The store is closed: the gateway is shutting down.") from error
        return await asyncio.wrap_future(future)

    def _begun(self) -> Connection:
        if self._connection is None:
            connection = self._engine.connect()
            try:
                connection.execution_options(gateway_read_only=self._read_only).begin()
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _end(self, *, commit: bool) -> None:
        with self._in_use:
            if self._connection is None:
                return
            with self._connection as connection:  # what is not committed is rolled back
                if commit:
                    connection.commit()

    def _abandon(self) -> None:
        if not self._in_use.acquire(blocking=False):
            self._stop()
            self._in_use.acquire()
        self._in_use.release()
        self._end(commit=False)

    def _stop(self) -> None:
        connection = self._connection
        if connection is None:
            return  # it is being opened, which ends by itself
        driver: Any = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            driver.interrupt()
            return
        try:
            driver.cancel_safe(timeout=_STOP_S)
        except Exception:  # noqa: BLE001 - whatever the driver has to say: a server that does not hear is hung up on
            with suppress(Exception), socket.socket(fileno=os.dup(driver.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)


class Database:
    """An open engine, its threads, and whose turn it is."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.backend = engine.dialect.name
        if self.backend == "sqlite":
            self._reading, self._writing = asyncio.Semaphore(SQLITE_READERS), asyncio.Semaphore(1)
            self._turns = [self._reading] * SQLITE_READERS + [self._writing]
        else:
            self._reading = self._writing = asyncio.Semaphore(POSTGRESQL_CONNECTIONS)
            self._turns = [self._reading] * POSTGRESQL_CONNECTIONS
        self._threads = ThreadPoolExecutor(len(self._turns), thread_name_prefix="gateway-store")

    @asynccontextmanager
    async def connect(self, *, read_only: bool) -> AsyncIterator[StoreConnection]:
        """One transaction on one connection; raises `StoreUnavailable` for a failure of the database."""
        turn = self._reading if read_only else self._writing
        try:
            async with asyncio.timeout(WAIT_S):
                await turn.acquire()
        except TimeoutError as error:
            raise _down("The gateway's database is busy") from error
        connection = StoreConnection(self.engine, self._threads, read_only=read_only)
        try:
            try:
                if not read_only:
                    await connection.begin()
                yield connection
            except (asyncio.CancelledError, GeneratorExit):
                with suppress(RuntimeError):  # no threads any more: the store has been closed
                    connection.abandon().add_done_callback(partial(_give, turn))
                raise
            except BaseException:
                await self._ended(connection, turn, commit=False)
                raise
            await self._ended(connection, turn, commit=True)
        except (DBAPIError, PoolTimeout, OSError) as error:
            if not _is_outage(error):
                raise
            raise _down("The gateway's database does not answer") from error

    async def aclose(self) -> None:
        """Close every connection, after what still uses one; not later than in 5 s."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                for turn in self._turns:
                    await turn.acquire()
        await asyncio.get_running_loop().run_in_executor(self._threads, self.engine.dispose)
        self._threads.shutdown(wait=False)

    async def _ended(self, connection: StoreConnection, turn: asyncio.Semaphore, *, commit: bool) -> None:
        ending = connection.end(commit=commit)
        ending.add_done_callback(partial(_give, turn))
        await asyncio.shield(ending)  # whoever does not wait for it cannot undo it


def _give(turn: asyncio.Semaphore, ended: asyncio.Future[None]) -> None:
    turn.release()
    if not ended.cancelled():
        ended.exception()  # it may be that nobody waits for it any more


def _fetched(result: Result[Any]) -> Result[Any]:
    # A frozen result is its rows, which another thread may read.
    return result.freeze()() if result.returns_rows else result  # type: ignore[attr-defined]


def _down(what: str) -> StoreUnavailable:
    return StoreUnavailable(f"{what}; send the request again in a moment.", retry_after_s=1)


def _is_outage(error: BaseException) -> bool:
    """Whether the database, not what was asked of it, is at fault: gone, locked, full, read-only, overloaded."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    # SQLite's driver also calls a missing table operational, which is a mistake of ours.
    return isinstance(error, OperationalError) and "no such " not in str(error.orig)
