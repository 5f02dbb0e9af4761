"""Ids of tool calls, made unique within a run.

The SDK ends a run whose model gives a call no id or one it gave before, and takes calls of one index for one call.
Servers do all three: an empty id, the same id in every turn, index 0 for every call of a turn.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall


class CallIds:
    """The ids of one model answer's calls; ``used`` are those of the run so far and grows."""

    def __init__(self, used: set[str]) -> None:
        self._used = used
        self._open: dict[int, _Call] = {}
        self._count = 0

    def settle(self, message: ChatCompletionMessage) -> None:
        """Give every call of a whole answer an id of its own, and its type."""
        for call in message.tool_calls or ():
            call.id = self._unique(getattr(call, "id", None))
            if getattr(call, "type", None) is None:
                call.type = "function"

    def follow(self, call: ChoiceDeltaToolCall) -> None:
        """Give a piece of a call the index and the id of its call."""
        index, id_ = getattr(call, "index", None) or 0, getattr(call, "id", None) or ""
        known = self._open.get(index)
        names_one = call.function is not None and bool(call.function.name)
        if known is None or (names_one and id_ and id_ != known.given):
            known = self._open[index] = _Call(id_, self._unique(id_), self._count)
            self._count += 1
            call.id = known.id
        else:
            call.id = None
            if names_one and call.function is not None:
                # Said again with every piece; the SDK would append it.
                call.function.name = None
        call.index = known.index

    def _unique(self, id_: str | None) -> str:
        if not id_ or id_ in self._used:
            id_ = f"call_{uuid.uuid4().hex}"
        self._used.add(id_)
        return id_


@dataclass(frozen=True, slots=True)
class _Call:
    given: str
    id: str
    index: int
