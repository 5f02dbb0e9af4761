"""RunEngine: drives an executor inside its deadline, and records every run once, however it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import cast

from gateway.errors import GatewayError, RunTimedOut, ShuttingDown
from gateway.events import RelayedBody, RelayedChunk, RelayEnded, Routed, RunEvent, RunFinished, TextDelta, Usage
from gateway.observability.logs import log_event
from gateway.observability.metrics import Metrics
from gateway.observability.recent import ErrorRecord, RecentErrors
from gateway.run import Executor, Run
from gateway.usage.prices import PICO

Sink = Callable[[RunEvent], Awaitable[None]]

_log = logging.getLogger("gateway.runs")
_DELTAS = (RelayedChunk, TextDelta)  # most events by far
_LAST = (RunFinished, RelayEnded, RelayedBody)


class RunEngine:
    """Executes runs in the task of whoever asks.

    A durable engine takes the same arguments and appends each event to a log before it hands it on.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.recent_errors = RecentErrors()
        self._live: set[asyncio.Timeout] = set()
        self._ends_at: float | None = None

    def drain(self, seconds: float) -> None:
        """End every run, live or yet to come, with `ShuttingDown` in ``seconds`` from now; the first call counts."""
        if self._ends_at is None:
            self._ends_at = asyncio.get_running_loop().time() + seconds
            for deadline in self._live:
                _bring_forward(deadline, self._ends_at)

    async def execute(self, run: Run, executor: Executor, sink: Sink) -> None:
        """Hand every event of the run to ``sink``, in order; return when the run is finished.

        Raises what the executor raises (`GatewayError`), or `RunTimedOut` past ``run.deadline_s``. Cancelling the
        calling task stops the executor, its model call and its tools before this returns.
        """
        started = time.perf_counter()
        outcome = "cancelled"
        self._metrics.run_started(run.model)
        first = True
        usage: Usage | None = None
        finish_reason: str | None = None
        error: GatewayError | None = None
        deadline = asyncio.timeout(run.deadline_s)
        try:
            async with deadline:
                self._live.add(deadline)
                if self._ends_at is not None:
                    _bring_forward(deadline, self._ends_at)
                events = cast("AsyncGenerator[RunEvent, None]", executor.execute(run))
                async with aclosing(events):
                    async for event in events:
                        if first and not isinstance(event, Routed):
                            first = False
                            self._metrics.first_token(run.model, time.perf_counter() - started)
                        if not isinstance(event, _DELTAS) and isinstance(event, _LAST):
                            usage, finish_reason = event.usage, event.finish_reason
                        await sink(event)
            outcome = "success"
        except TimeoutError as cause:
            outcome = "failure"
            if not deadline.expired():
                raise
            error = self._out_of_time(run, deadline)
            raise error from cause
        except GatewayError as failure:
            error, outcome = failure, "failure"
            raise
        except Exception:
            outcome = "failure"
            raise
        finally:
            self._live.discard(deadline)
            seconds = time.perf_counter() - started
            self._metrics.run_finished(run.model, run.streamed, outcome, seconds)
            if outcome == "failure":
                self.recent_errors.add(_record(run, error))
            if usage is not None:
                self._metrics.tokens(run.model, usage.input_tokens, usage.output_tokens)
            log_event(
                _log,
                "run.finished",
                level=logging.INFO if error is None else logging.WARNING,
                run_id=run.id.hex,
                model=run.model,
                key_id=run.principal.key_id,
                streamed=run.streamed,
                outcome=outcome,
                finish_reason=finish_reason,
                error_code=error.code if error else None,
                input_tokens=usage.input_tokens if usage else None,
                output_tokens=usage.output_tokens if usage else None,
                cached_input_tokens=usage.cached_input_tokens if usage else None,
                reasoning_tokens=usage.reasoning_tokens if usage else None,
                usage_estimated=usage.estimated if usage else None,
                cost_usd=usage.cost / PICO if usage and usage.cost is not None else None,
                cost_reported=usage.cost_reported if usage and usage.cost is not None else None,
                duration_ms=round(seconds * 1000, 2),
            )

    def _out_of_time(self, run: Run, deadline: asyncio.Timeout) -> GatewayError:
        if self._ends_at is not None and deadline.when() == self._ends_at:
            return ShuttingDown("The gateway is shutting down; send the request again in a moment.", retry_after_s=1)
        return RunTimedOut(
            f"The run passed its limit of {run.deadline_s:g} s. Ask for a shorter answer, or raise the agent's "
            "'timeout_s' or GATEWAY_RUN_TIMEOUT_S."
        )


def _bring_forward(deadline: asyncio.Timeout, when: float) -> None:
    before = deadline.when()
    if not deadline.expired() and (before is None or before > when):
        deadline.reschedule(when)


def _record(run: Run, error: GatewayError | None) -> ErrorRecord:
    """What `GET /agents/errors` shows of a failed run; the cause of an unexpected one stands in the log alone."""
    return ErrorRecord(
        event="run.failed",
        message=error.message if error else "The run failed in a way the gateway did not expect; see its log.",
        request_id=run.request_id,
        agent_id=run.model,
        error_stage="run",
        details={"run_id": run.id.hex, "code": error.code if error else "internal_error"},
    )
