"""Hedging: a second target is asked when the first is slow; the first answer counts, the other request is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from gateway.chat import CHAT_PATH
from gateway.errors import GatewayError
from gateway.routing.call import RoutedCall, Try
from gateway.routing.failures import ELSEWHERE
from gateway.routing.strategies import Candidate

T = TypeVar("T")

Ask = Callable[[Candidate], Coroutine[Any, Any, T]]
"""Sends the call's request to one target and returns with its first byte."""

HEDGED_PATHS = frozenset({CHAT_PATH, "/completions", "/embeddings"})
"""Requests that leave nothing behind at an upstream; a response or a file that is kept there would be there twice."""


class _Kept(msgspec.Struct):
    store: bool | None = None


def may_hedge(path: str, body: bytes) -> bool:
    """Whether a request may be sent twice: none that the upstream is asked to keep (``store``)."""
    if path not in HEDGED_PATHS:
        return False
    if b'"store"' not in body:
        return True
    try:
        return not msgspec.json.decode(body, type=_Kept).store
    except msgspec.DecodeError:
        return False


async def ask_hedged(
    call: RoutedCall, ask: Ask[T], drop: Callable[[T], Awaitable[None]], *, streamed: bool, body_bytes: int
) -> T:
    """Return the first answer of the call's candidate, or of a second target that is asked once the first is late.

    The call's candidate is then who answered. Raises the failure of the candidate once no answer can come any more;
    whoever calls decides about further tries. ``drop`` is given an answer that came too late.
    """
    health, after_s = call.candidate.health, call.hedge_after_s(streamed=streamed)
    started = time.perf_counter()
    first = asyncio.create_task(ask(call.candidate))
    tasks, kept = [first], None
    try:
        await asyncio.wait(tasks, timeout=after_s)
        hedge = None if first.done() else call.hedge()
        if hedge is not None:
            tasks.append(asyncio.create_task(ask(hedge.candidate)))
            kept = await _race(call, hedge, first, tasks[1], body_bytes)
            answer = kept.result()
        else:
            answer = await first
            kept = first
        health.note_time(time.perf_counter() - started, streamed=streamed)
        return answer
    finally:
        await _end([task for task in tasks if task is not kept], kept, drop)


async def _race(
    call: RoutedCall, hedge: Try, first: asyncio.Task[T], second: asyncio.Task[T], body_bytes: int
) -> asyncio.Task[T]:
    """Return the task that has an answer."""
    pending = True  # the hedge is not accounted for yet
    try:
        await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
        if not first.done() and (error := _failure(second)) is not None:
            pending = False
            call.hedge_failed(hedge, error)
            await asyncio.wait((first,))
        if not first.done():
            second.result()
            pending = False
            call.beaten_by(hedge, body_bytes)
            return second
        error = _failure(first)
        if error is None:
            first.result()
            if pending:
                pending = False
                call.hedge_lost(hedge, body_bytes)
            return first
        if not pending or call.kind_of(error, call.candidate) not in ELSEWHERE:
            raise error
        # The hedge is the other target that would be asked now.
        pending = False
        call.failed(error)
        call.adopt(hedge)
        await asyncio.wait((second,))
        second.result()
        return second
    finally:
        if pending:
            call.hedge_dropped(hedge)


async def _end(
    losers: list[asyncio.Task[T]], kept: asyncio.Task[T] | None, drop: Callable[[T], Awaitable[None]]
) -> None:
    """Cancel requests, which closes their sockets, and wait until they are closed."""
    for task in losers:
        task.cancel()
    try:
        if losers:
            await asyncio.wait(losers)
    except asyncio.CancelledError:
        if kept is not None:
            losers.append(kept)  # nobody takes the answer any more
        raise
    finally:
        for task in losers:
            if task.done() and not task.cancelled() and task.exception() is None:
                await drop(task.result())


def _failure(task: asyncio.Task[T]) -> GatewayError | None:
    error = task.exception() if task.done() and not task.cancelled() else None
    return error if isinstance(error, GatewayError) else None
