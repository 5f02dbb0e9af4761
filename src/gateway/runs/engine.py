"""RunEngine: drives an executor inside its deadline, and records every run once, however it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import cast

from gateway.chat import CHAT_PATH, RelayRequest
from gateway.deadlines import Deadlines
from gateway.errors import GatewayError, Overloaded, RunTimedOut, ShuttingDown, Unauthenticated
from gateway.events import RelayedBody, RelayedChunk, RelayEnded, Routed, RunEvent, RunFinished, TextDelta, Usage
from gateway.observability.logs import EventShape
from gateway.observability.metrics import Metrics
from gateway.observability.recent import ErrorRecord, RecentErrors
from gateway.observability.traces import current_span
from gateway.principal import Principal
from gateway.run import DirectExecutor, Executor, Outlet, RelayedAnswer, Run
from gateway.runs.spans import run_span
from gateway.usage.ledger import Ledger
from gateway.usage.prices import PICO

Sink = Callable[[RunEvent], Awaitable[None]]

_log = logging.getLogger("gateway.runs")
_SPENT = (
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "reasoning_tokens",
    "usage_estimated",
    "cost_usd",
    "cost_reported",
    "cached",
)
_NOTHING_SPENT = (None,) * len(_SPENT)
_FINISHED = EventShape(
    _log,
    "run.finished",
    *("run_id", "model", "key_id", "streamed", "outcome", "finish_reason", "error_code", *_SPENT, "duration_ms"),
    foreign=("model", "finish_reason", "error_code"),
)
_DELTAS = (RelayedChunk, TextDelta)  # most events by far
_LAST = (RunFinished, RelayEnded, RelayedBody)


class RunEngine:
    """Executes runs in the task of whoever asks; used in one event loop.

    A durable engine takes the same arguments and appends each event to a log before it hands it on.
    """

    def __init__(self, metrics: Metrics, ledger: Ledger | None = None, *, max_runs: int = 2_000) -> None:
        self.metrics = metrics
        self.max_runs = max_runs
        self.ledger = ledger
        self.recent_errors = RecentErrors()
        self.ends_at: float | None = None
        self._deadlines: Deadlines[_Recording] | None = None

    @property
    def deadlines(self) -> Deadlines[_Recording]:
        """The live runs and the times they end at."""
        if self._deadlines is None:
            self._deadlines = Deadlines(asyncio.get_running_loop())
        return self._deadlines

    def drain(self, seconds: float) -> None:
        """End every run, live or yet to come, with `ShuttingDown` in ``seconds`` from now; the first call counts."""
        if self.ends_at is None:
            self.ends_at = asyncio.get_running_loop().time() + seconds
            for recording in self.deadlines.watched:
                recording.due = min(recording.due, self.ends_at)
            self.deadlines.advance(self.ends_at)

    def cut(self, honoured: Callable[[Principal], bool]) -> int:
        """End the live runs of callers who are not honoured any more with `Unauthenticated`; return how many."""
        revoked = [recording for recording in self.deadlines.watched if not honoured(recording.principal)]
        for recording in revoked:
            recording.revoke()
        return len(revoked)

    async def execute(self, run: Run, executor: Executor, sink: Sink) -> None:
        """Hand every event of the run to ``sink``, in order; return when the run is finished.

        Raises what the executor raises (`GatewayError`), or `RunTimedOut` past ``run.deadline_s``. Cancelling the
        calling task stops the executor, its model call and its tools before this returns.
        """
        with _Recording(self, run) as recording:
            first = True
            events = cast("AsyncGenerator[RunEvent, None]", executor.execute(run))
            async with aclosing(events):
                async for event in events:
                    if first and not isinstance(event, Routed):
                        first = False
                        recording.began()
                    if not isinstance(event, _DELTAS) and isinstance(event, _LAST):
                        recording.usage, recording.finish_reason = event.usage, event.finish_reason
                    await sink(event)

    async def answer(self, run: Run, executor: DirectExecutor) -> RelayedAnswer:
        """Return the whole answer of an executor that needs no events; else as `execute`."""
        with _Recording(self, run) as recording:
            answer = await executor.answer(run)
            recording.began()
            recording.usage, recording.finish_reason = answer.body.usage, answer.body.finish_reason
            return answer

    async def pipe(self, run: Run, executor: DirectExecutor, outlet: Outlet) -> None:
        """Let an executor that needs no events write its stream to ``outlet``; else as `execute`."""
        with _Recording(self, run) as recording:
            ended = await executor.pipe(run, outlet, recording.began)
            recording.usage, recording.finish_reason = ended.usage, ended.finish_reason


class _Recording:
    """One live run: holds its deadline inside ``with``, and leaves its traces at the end."""

    __slots__ = (
        "_cancelling",
        "_engine",
        "_expired",
        "_revoked",
        "_run",
        "_span",
        "_started",
        "_task",
        "due",
        "finish_reason",
        "usage",
    )

    def __init__(self, engine: RunEngine, run: Run) -> None:
        self._engine, self._run = engine, run
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self._expired = self._revoked = False

    @property
    def principal(self) -> Principal:
        """Whose run it is."""
        return self._run.principal

    def __enter__(self) -> _Recording:
        engine = self._engine
        if len(engine.deadlines.watched) >= engine.max_runs:
            if self._run.reservation is not None:
                self._run.reservation.end()
            raise Overloaded(f"{engine.max_runs:,} runs are under way already; try again in a moment.", retry_after_s=1)
        task = asyncio.current_task()
        assert task is not None, "runs are executed in tasks"
        self._task, self._cancelling = task, task.cancelling()
        self._started = time.perf_counter()
        deadlines = engine.deadlines
        self.due = deadlines.now() + self._run.deadline_s
        if engine.ends_at is not None:
            self.due = min(self.due, engine.ends_at)
        engine.metrics.run_started(self._run.model)
        above = current_span()
        self._span = above if above is None else run_span(above, self._run)
        deadlines.watch(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run.reservation is not None:
            self._run.reservation.end()
        self._engine.deadlines.forget(self)
        if self._span is not None:
            self._span.ended(error, self.usage, self.finish_reason)
        late = self._expired and self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError)
        if error is None:
            self._record("success", None)
        elif isinstance(error, GatewayError):
            self._record("failure", error)
        elif isinstance(error, Exception):
            self._record("failure", None)
        elif late:
            shown = self._out_of_time()
            self._record("failure", shown)
            raise shown from error
        else:
            self._record("cancelled", None)

    def expire(self) -> None:
        """Stop the run."""
        if not self._expired:
            self._expired = True
            self._task.cancel()

    def revoke(self) -> None:
        """Stop the run because its key ended."""
        self._revoked = self._revoked or not self._expired
        self.expire()

    def began(self) -> None:
        """Note the first event."""
        if self._span is not None:
            self._span.began()
        self._engine.metrics.first_token(self._run.model, time.perf_counter() - self._started)

    def _record(self, outcome: str, error: GatewayError | None) -> None:
        run, usage, metrics = self._run, self.usage, self._engine.metrics
        seconds = time.perf_counter() - self._started
        metrics.run_finished(run.model, run.streamed, outcome, seconds)
        if outcome == "failure":
            self._engine.recent_errors.add(_record(run, error))
        if usage is not None and not usage.cached:
            metrics.tokens(run.model, usage.input_tokens, usage.output_tokens)
        if self._engine.ledger is not None:
            path = run.request.path if isinstance(run.request, RelayRequest) else None
            self._engine.ledger.ended(
                run,
                path=path or CHAT_PATH,
                is_agent=path is None,
                outcome=outcome,
                error_code=error.code if error else None,
                seconds=seconds,
                cached=usage is not None and usage.cached,
            )
        _FINISHED.log(
            [
                run.id.hex,
                run.model,
                run.principal.key_id,
                run.streamed,
                outcome,
                self.finish_reason,
                error.code if error is not None else None,
                *(_spent(usage) if usage is not None else _NOTHING_SPENT),
                round(seconds * 1000, 2),
            ],
            logging.INFO if error is None else logging.WARNING,
        )

    def _out_of_time(self) -> GatewayError:
        if self._revoked:
            return Unauthenticated(
                f"The API key '{self.principal.key_id}' was revoked or has expired while the request was answered."
            )
        if self.due == self._engine.ends_at:
            return ShuttingDown("The gateway is shutting down; send the request again in a moment.", retry_after_s=1)
        return RunTimedOut(
            f"The run passed its limit of {self._run.deadline_s:g} s. Ask for a shorter answer, or raise the agent's "
            "'timeout_s' or GATEWAY_RUN_TIMEOUT_S."
        )


def _spent(usage: Usage) -> tuple[object, ...]:
    return (
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.reasoning_tokens,
        usage.estimated,
        None if usage.cost is None else usage.cost / PICO,
        None if usage.cost is None else usage.cost_reported,
        usage.cached or None,
    )


def _record(run: Run, error: GatewayError | None) -> ErrorRecord:
    """What `GET /agents/errors` shows of a failed run; the cause of an unexpected one stands in the log alone."""
    return ErrorRecord(
        event="run.failed",
        message=error.told if error else "The run failed in a way the gateway did not expect; see its log.",
        request_id=run.request_id,
        agent_id=run.model,
        error_stage="run",
        details={"run_id": run.id.hex, "code": error.code if error else "internal_error"},
    )
