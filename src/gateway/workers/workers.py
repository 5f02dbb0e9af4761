"""Workers: how code in one worker has something done in every worker; with one worker, a plain call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.errors import GatewayError
from gateway.workers.failures import Failure
from gateway.workers.peer import CallFailed, Handler, Peer

_MARGIN_S = 5.0


class WorkerReply(msgspec.Struct, frozen=True):
    """What one worker answered: a value, or the reason why there is none, as an error where it was one of ours."""

    slot: int
    pid: int
    value: Any = None
    error: str | None = None
    failure: Failure | None = None


def shared_failure(replies: Sequence[WorkerReply]) -> GatewayError | None:
    """Return what every worker failed with, if it was the same; None when one did it, or they failed in two ways."""
    if not replies or any(reply.error is None for reply in replies):
        return None
    failures = [reply.failure for reply in replies]
    if len({failure and (failure.kind, failure.code) for failure in failures}) > 1:
        return None
    failure = failures[0]
    return GatewayError(f"No worker could do it: {replies[0].error}") if failure is None else failure.error()


class Workers:
    """The workers of this gateway as one of them sees them.

    ``slot`` counts from 0 and stays the same when a dead worker is replaced; ``count`` is how many there are to be.
    ``supervisor`` is None where the process is the only one. Values are plain data, as JSON has it.
    """

    def __init__(self, slot: int = 0, count: int = 1, supervisor: Peer | None = None) -> None:
        self.slot = slot
        self.count = count
        self._supervisor = supervisor
        self._handlers: dict[str, Handler] = {}

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process to ask."""
        return self._supervisor is None

    def handle(self, name: str, handler: Handler) -> None:
        """Have ``handler(value)`` do, in this worker, what `everywhere` asks for under that name."""
        self._handlers[name] = handler
        if self._supervisor is not None:
            self._supervisor.handle(name, handler)

    async def everywhere(self, name: str, value: Any = None, *, timeout_s: float = 30.0) -> Sequence[WorkerReply]:
        """Do it in every worker, this one included, and return one reply of each, by slot.

        A worker that is just being replaced has none: it begins with what the disk says. Raises `CallFailed` when the
        supervisor is gone.
        """
        if self._supervisor is None:
            return await self.here(name, value)
        answers = await self._supervisor.call("everywhere", [name, value, timeout_s], timeout_s=timeout_s + _MARGIN_S)
        return msgspec.convert(answers, list[WorkerReply])

    async def here(self, name: str, value: Any = None) -> Sequence[WorkerReply]:
        """Do it in this worker alone."""
        try:
            return [WorkerReply(self.slot, os.getpid(), await self._handlers[name](value))]
        except GatewayError as error:
            return [WorkerReply(self.slot, os.getpid(), error=error.message, failure=Failure.of(error))]

    async def ask_supervisor(self, name: str, value: Any = None, *, timeout_s: float = 30.0) -> Any:
        """Return what the supervisor answers; raises `CallFailed`."""
        if self._supervisor is None:
            raise CallFailed("there is no supervisor")
        return await self._supervisor.call(name, value, timeout_s=timeout_s)

    def notify_supervisor(self, name: str, value: Any) -> None:
        """Tell the supervisor something, without waiting; raises `CallFailed` where it is gone."""
        if self._supervisor is not None:
            self._supervisor.notify(name, value)

    async def tell_supervisor(self, name: str, value: Any) -> None:
        """Have the supervisor take a value before whatever it is sent after this; raises `CallFailed`."""
        await self.ask_supervisor(name, value)
