"""Ledger: one row for every run and model call, written to the store outside the call.

A call appends a tuple; a background task turns what has gathered into rows and writes them in one transaction. What a
process has not written yet (`GATEWAY_USAGE_FLUSH_S`, one second) is lost when it is killed; rows survive that.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from gateway.errors import GatewayError
from gateway.events import Usage
from gateway.observability.logs import log_event
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.store.store import Store
from gateway.usage.question import Question, Totals

if TYPE_CHECKING:  # importing SQLAlchemy is put off until there are rows
    from gateway.usage.rows import Row, Rows

MOST_WAITING = 20_000
"""Entries kept while the store does not take any, about 10 MB; later ones are dropped and counted."""

_SLICE = 200
"""Entries that become rows in one piece of the loop's time, half a millisecond."""
_BATCH = 2_000
"""Rows of one transaction."""
_PRUNED_AT_ONCE = 500
_PRUNE_PAUSE_S = 0.01
_LAST_FLUSH_S = 5.0
_PRUNE_EVERY_S = 3_600.0
_COMPLAIN_EVERY_S = 60.0
_DAY_MS = 86_400_000

_NOTHING = Usage()
_log = logging.getLogger("gateway.usage")


class LedgerRun(Protocol):
    """What the ledger keeps of a run; `gateway.run.Run` has it."""

    @property
    def id(self) -> uuid.UUID:
        """The run's id, the same on every surface."""
        ...

    @property
    def request_id(self) -> str:
        """The request that asked for it."""
        ...

    @property
    def principal(self) -> Principal:
        """Who asked."""
        ...

    @property
    def model(self) -> str:
        """What was asked for, as a canonical id."""
        ...

    @property
    def end_user(self) -> str | None:
        """For whom, by the caller's own word."""
        ...


class Entry(Struct, gc=False):
    """One model call, one run that ended, or both: a run that is one call. The call's cost is in ``usage``.

    ``upstream`` is None for a run alone, ``outcome`` for a call whose run goes on. ``byok``: the caller brought its own
    key for the upstream.
    """

    at: float
    id: uuid.UUID
    request_id: str
    principal: Principal
    model: str
    end_user: str | None
    path: str
    agent: str | None
    upstream: str | None = None
    upstream_model: str | None = None
    usage: Usage = _NOTHING
    price_version: str | None = None
    outcome: str | None = None
    error_code: str | None = None
    seconds: float = 0.0
    cached: bool = False
    byok: bool = False


class Ledger:
    """Collects on the hot path, writes in the background; see `open_ledger`."""

    def __init__(self, store: Store, metrics: Metrics, *, flush_s: float, retention_days: int) -> None:
        self._store = store
        self._metrics = metrics
        self._flush_s = flush_s
        self._retention_days = retention_days
        self._waiting: list[Entry] = []
        self._unended: dict[int, Entry] = {}
        """Of those, the relayed calls whose runs go on, by the runs' ids."""
        self._unwritten: list[Row] = []
        self._dropped = self._said = 0
        self._complained: float | None = None
        self._flushing: asyncio.Task[None] | None = None

    def charged(
        self,
        run: LedgerRun,
        usage: Usage,
        *,
        path: str,
        agent: str | None,
        upstream: str,
        model: str,
        price_version: str | None,
        byok: bool = False,
    ) -> None:
        """Note a model call of a run; ``model`` is the upstream's name for it, ``agent`` who made it, if any."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
            return
        entry = Entry(
            time.time(),
            run.id,
            run.request_id,
            run.principal,
            run.model,
            run.end_user,
            path,
            agent,
            upstream,
            model,
            usage,
            price_version,
            byok=byok,
        )
        self._waiting.append(entry)
        if agent is None:
            self._unended[run.id.int] = entry

    def ended(
        self,
        run: LedgerRun,
        *,
        path: str,
        is_agent: bool,
        outcome: str,
        error_code: str | None,
        seconds: float,
        cached: bool,
    ) -> None:
        """Note the end of a run, however it ended; ``cached`` when no upstream was asked for it."""
        entry = None if is_agent else self._unended.pop(run.id.int, None)
        if entry is None:
            if len(self._waiting) >= MOST_WAITING:
                self._dropped += 1
                return
            entry = Entry(
                time.time(),
                run.id,
                run.request_id,
                run.principal,
                run.model,
                run.end_user,
                path,
                run.model if is_agent else None,
            )
            self._waiting.append(entry)
        entry.outcome = outcome
        entry.error_code = error_code
        entry.seconds = seconds
        entry.cached = cached

    async def flush(self) -> None:
        """Write what has gathered. Raises `StoreUnavailable`; the rows are kept for the next time.

        Whoever stops waiting does not stop the writing: half of it might be written, and then again.
        """
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
            self._flushing.add_done_callback(_seen)
        await asyncio.shield(self._flushing)

    async def ask(self, question: Question) -> Totals:
        """Return sums over a time. What this process has not written yet is written first; raises as that does."""
        await self._catch_up()
        from gateway.usage import rows  # noqa: PLC0415 - SQLAlchemy, when it is needed

        async with self._store.reading() as connection:
            return await connection.run(rows.ask, question)

    async def list_rows(self, question: Question) -> Rows:
        """Return single rows, the latest first; else as `ask`."""
        await self._catch_up()
        from gateway.usage import rows  # noqa: PLC0415 - SQLAlchemy, when it is needed

        async with self._store.reading() as connection:
            return await connection.run(rows.list_rows, question)

    async def run(self) -> None:
        """Write every ``flush_s`` until cancelled."""
        while True:
            await asyncio.sleep(self._flush_s)
            try:
                if self._waiting or self._unwritten:
                    await self.flush()
            except GatewayError:
                continue  # the store has said so in the log; the rows wait
            except Exception as error:  # noqa: BLE001 - a background loop: one bad batch ends neither it nor the gateway
                log_event(_log, "usage.write.failed", level=logging.ERROR, exc_info=error, rows=len(self._unwritten))
                self._metrics.usage_rows("dropped", len(self._unwritten))
                self._unwritten.clear()

    async def prune(self) -> None:
        """Remove what is too old every hour, between the batches of `run`, until cancelled."""
        while True:
            await asyncio.sleep(self._flush_s)
            if self._store.status != "ready":
                continue
            try:
                await self._prune()
            except GatewayError:
                continue  # the store has said so in the log
            except Exception as error:  # noqa: BLE001 - a background loop: rows go on being written meanwhile
                log_event(_log, "usage.prune.failed", level=logging.ERROR, exc_info=error)
            await asyncio.sleep(_PRUNE_EVERY_S)

    async def close(self) -> None:
        """Write the last rows; what cannot be written within 5 s is counted as dropped."""
        with suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(_LAST_FLUSH_S):
                await self.flush()
        if self._flushing is not None:
            self._flushing.cancel()
        self._dropped += len(self._unwritten) + len(self._waiting)
        self._complained = None
        self._report_drops()

    async def _flush(self) -> None:
        try:
            while self._unwritten or self._waiting:
                await self._write_some()
        finally:
            self._flushing = None
            self._report_drops()

    async def _catch_up(self) -> None:
        await self.flush()
        await self._store.open()

    async def _write_some(self) -> None:
        await self._store.open()  # first, so that what cannot be written stays as small as it came
        from gateway.usage import rows  # noqa: PLC0415 - SQLAlchemy, when it is needed

        if not self._unwritten:
            entries, self._waiting = self._waiting, []
            self._unended.clear()
            for start in range(0, len(entries), _SLICE):
                rows.add_rows(self._unwritten, entries[start : start + _SLICE])
                await asyncio.sleep(0)
        batch = self._unwritten[:_BATCH]
        async with self._store.transaction() as connection:
            await connection.run(rows.insert, batch)
        del self._unwritten[: len(batch)]
        self._metrics.usage_rows("written", len(batch))

    async def _prune(self) -> None:
        from gateway.usage import rows  # noqa: PLC0415 - SQLAlchemy, when it is needed

        before = int(time.time() * 1000) - self._retention_days * _DAY_MS
        removed = 0
        while True:
            async with self._store.transaction() as connection:
                count = await connection.run(rows.prune, before, _PRUNED_AT_ONCE)
            removed += count
            if count < _PRUNED_AT_ONCE:
                break
            await asyncio.sleep(_PRUNE_PAUSE_S)  # rows of calls come in between
        if removed:
            log_event(_log, "usage.pruned", rows=removed, older_than_days=self._retention_days)

    def _report_drops(self) -> None:
        new = self._dropped - self._said
        if not new:
            return
        now = time.monotonic()
        if self._complained is None or now - self._complained >= _COMPLAIN_EVERY_S:
            self._complained = now
            log_event(
                _log,
                "usage.rows.dropped",
                level=logging.ERROR,
                message="Rows of the usage ledger were dropped: the store takes none.",
                rows=self._dropped,
            )
        self._said = self._dropped
        self._metrics.usage_rows("dropped", new)


@asynccontextmanager
async def open_ledger(store: Store, metrics: Metrics, *, flush_s: float, retention_days: int) -> AsyncIterator[Ledger]:
    """Keep a ledger until the block ends, and write the last rows then."""
    ledger = Ledger(store, metrics, flush_s=flush_s, retention_days=retention_days)
    tasks = [asyncio.create_task(ledger.run()), asyncio.create_task(ledger.prune())]
    try:
        yield ledger
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await ledger.close()


def _seen(flushing: asyncio.Task[None]) -> None:
    """Whoever asked may be gone by now: a failure of the store is in the log all the same."""
    if not flushing.cancelled():
        flushing.exception()
