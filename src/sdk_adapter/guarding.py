"""What keeps an answer back until guardrails have judged it: a streamed word cannot be taken back."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from agents import InputGuardrail, OutputGuardrail, ToolInputGuardrail, ToolOutputGuardrail

from gateway.events import RunEvent

Guardrail = TypeVar(
    "Guardrail", InputGuardrail[Any], OutputGuardrail[Any], ToolInputGuardrail[Any], ToolOutputGuardrail[Any]
)


def judged_off_the_loop(guardrail: Guardrail) -> Guardrail:
    """Return a guardrail whose plain (not async) function runs in a worker thread; an async one as it is."""
    judge: Any = guardrail.guardrail_function
    if inspect.iscoroutinefunction(judge) or inspect.iscoroutinefunction(type(judge).__call__):
        return guardrail

    async def threaded(*arguments: Any) -> Any:
        output = await asyncio.to_thread(judge, *arguments)
        return await output if inspect.isawaitable(output) else output

    return replace(guardrail, guardrail_function=threaded, name=guardrail.get_name())


class InputVerdict:
    """Watches the input guardrails that run beside the model; ``pending`` is 0 once all of them have passed."""

    def __init__(self, guardrails: Sequence[InputGuardrail[Any]]) -> None:
        self.pending = sum(guardrail.run_in_parallel for guardrail in guardrails)
        self.watched = [self._watch(item) if item.run_in_parallel else item for item in guardrails]

    def _watch(self, guardrail: InputGuardrail[Any]) -> InputGuardrail[Any]:
        judge = judged_off_the_loop(guardrail).guardrail_function

        async def watched(context: Any, agent: Any, input: Any) -> Any:
            output = judge(context, agent, input)
            if inspect.isawaitable(output):
                output = await output
            self.pending -= not output.tripwire_triggered
            return output

        return replace(guardrail, guardrail_function=watched, name=guardrail.get_name())


class Gate:
    """Holds events back: to the end of the run when ``guarded``, else until the input has been judged."""

    def __init__(self, *, guarded: bool, verdict: InputVerdict) -> None:
        self._guarded = guarded
        self._verdict = verdict
        self._held: list[RunEvent] = []

    def put(self, event: RunEvent) -> Sequence[RunEvent]:
        """Take an event and return what may be shown now."""
        if self._guarded or self._verdict.pending:
            self._held.append(event)
            return ()
        return (*self.open(), event) if self._held else (event,)

    def open(self) -> Sequence[RunEvent]:
        """Return everything held back."""
        held, self._held = self._held, []
        return held
