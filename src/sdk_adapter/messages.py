"""Chat messages → SDK input items (the SDK itself only has the opposite direction).

Messages of the client's ``system`` and ``developer`` roles become input items: they add to the agent's own
instructions and never replace them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, assert_never

from agents.models.fake_id import FAKE_RESPONSES_ID

from gateway.chat import (
    AssistantMessage,
    AudioPart,
    CustomToolCall,
    DeveloperMessage,
    FilePart,
    FunctionMessage,
    FunctionToolCall,
    ImagePart,
    Message,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
    UserPart,
)
from gateway.errors import InvalidRequest, UnsupportedParameter

Item = dict[str, Any]


class NamedText(str):
    """A text that remembers the participant's ``name``, which SDK items have no place for.

    The client that sends the model call puts it back (`sdk_adapter.clients`).
    """

    __slots__ = ("name",)
    name: str

    def __new__(cls, text: str, name: str) -> NamedText:
        """Return ``text``, said by ``name``."""
        named = super().__new__(cls, text)
        named.name = name
        return named

    def __deepcopy__(self, memo: object) -> NamedText:
        return self

    def __reduce__(self) -> tuple[type[NamedText], tuple[str, str]]:
        return NamedText, (str(self), self.name)


class Recollection(Protocol):
    """Finds what the gateway itself did in the turn in which it returned a client tool's call."""

    def recall(self, call_ids: Sequence[str]) -> list[Item] | None:
        """Return the items of that run, calls included, or None when nothing is kept."""
        ...


def items_of(messages: Sequence[Message], memory: Recollection | None = None) -> list[Item]:
    """Translate a conversation.

    Raises `InvalidRequest` for a tool result without its call, or a call without its result; `UnsupportedParameter`
    for a part that SDK items cannot carry.
    """
    translation = _Translation(memory)
    for index, message in enumerate(messages):
        translation.add(index, message)
    translation.end(len(messages))
    return translation.items


class _Translation:
    def __init__(self, memory: Recollection | None) -> None:
        self.items: list[Item] = []
        self._memory = memory
        self._open_calls: dict[str, int] = {}
        self._function_calls: dict[str, str] = {}

    def add(self, index: int, message: Message) -> None:
        if not isinstance(message, ToolMessage | FunctionMessage):
            self._refuse_open_calls()
        match message:
            case SystemMessage() | DeveloperMessage():
                role = "system" if isinstance(message, SystemMessage) else "developer"
                content = _texts(message.content)
                self.items.append({"role": role, "content": _named(content, message.name, index)})
            case UserMessage():
                at = f"messages[{index}].content"
                parts = (
                    message.content
                    if isinstance(message.content, str)
                    else [_part(part, f"{at}[{n}]") for n, part in enumerate(message.content)]
                )
                self.items.append({"role": "user", "content": _named(parts, message.name, index)})
            case AssistantMessage():
                self._assistant(index, message)
            case ToolMessage():
                if message.tool_call_id not in self._open_calls:
                    raise InvalidRequest(
                        f"messages[{index}] answers the tool call '{message.tool_call_id}', which no assistant message "
                        "directly before it made.",
                        param=f"messages[{index}].tool_call_id",
                    )
                del self._open_calls[message.tool_call_id]
                self._output(message.tool_call_id, _texts(message.content or ""))
            case FunctionMessage():
                call_id = self._function_calls.pop(message.name, None)
                if call_id is None:
                    raise InvalidRequest(
                        f"messages[{index}] answers the function '{message.name}', which no assistant message directly "
                        "before it called.",
                        param=f"messages[{index}].name",
                    )
                self._open_calls.pop(call_id, None)
                self._output(call_id, message.content or "")
            case _:
                assert_never(message)

    def end(self, count: int) -> None:
        """Check that the conversation does not stop before the tools have answered."""
        del count
        self._refuse_open_calls()

    def _assistant(self, index: int, message: AssistantMessage) -> None:
        calls = list(_calls(index, message))
        recalled = self._memory.recall([call["call_id"] for call in calls]) if calls and self._memory else None
        if recalled is not None:
            self.items.extend(recalled)
        else:
            content = list(_answer_parts(message))
            if message.name is not None and content and all(part["type"] == "output_text" for part in content):
                text = "\n".join(part["text"] for part in content)
                self.items.append({"role": "assistant", "content": NamedText(text, message.name)})
            elif content or not calls:
                self.items.append(_answer(content or [{"type": "output_text", "text": "", "annotations": []}]))
            self.items.extend(calls)
        self._open_calls = {call["call_id"]: index for call in calls}
        if message.function_call is not None:
            self._function_calls = {message.function_call.name: calls[-1]["call_id"]}

    def _output(self, call_id: str, output: str | list[Item]) -> None:
        self.items.append({"type": "function_call_output", "call_id": call_id, "output": output})

    def _refuse_open_calls(self) -> None:
        if self._open_calls:
            call_id, index = next(iter(self._open_calls.items()))
            raise InvalidRequest(
                f"The tool call '{call_id}' of messages[{index}] has no result: an assistant message with 'tool_calls' "
                "must be followed by one tool message for each of them.",
                param=f"messages[{index}].tool_calls",
            )


def _answer(content: list[Item]) -> Item:
    # The SDK strips this id before it reaches an upstream that would check it.
    return {"type": "message", "id": FAKE_RESPONSES_ID, "role": "assistant", "status": "completed", "content": content}


def _answer_parts(message: AssistantMessage) -> Iterator[Item]:
    content = [TextPart(message.content)] if isinstance(message.content, str) else message.content or []
    for part in content:
        if isinstance(part, RefusalPart):
            yield {"type": "refusal", "refusal": part.refusal}
        else:
            yield {"type": "output_text", "text": part.text, "annotations": []}
    if message.refusal is not None:
        yield {"type": "refusal", "refusal": message.refusal}


def _calls(index: int, message: AssistantMessage) -> Iterator[Item]:
    for call in message.tool_calls or ():
        if isinstance(call, FunctionToolCall):
            yield _call(call.id, call.function.name, call.function.arguments)
        elif isinstance(call, CustomToolCall):
            yield _call(call.id, call.custom.name, json.dumps({"input": call.custom.input}))
    if message.function_call is not None:
        yield _call(f"call_function_{index}", message.function_call.name, message.function_call.arguments)


def _call(call_id: str, name: str, arguments: str) -> Item:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def _texts(content: str | list[TextPart]) -> str | list[Item]:
    return content if isinstance(content, str) else [{"type": "input_text", "text": part.text} for part in content]


def _part(part: UserPart, at: str) -> Item:
    match part:
        case TextPart(text=text):
            return {"type": "input_text", "text": text}
        case ImagePart(image_url=image):
            if not image.url:
                raise InvalidRequest("An image needs a URL.", param=f"{at}.image_url.url")
            return {"type": "input_image", "image_url": image.url, "detail": image.detail or "auto"}
        case AudioPart(input_audio=audio):
            if not audio.data or not audio.format:
                raise InvalidRequest("Audio needs its data and its format.", param=f"{at}.input_audio")
            return {"type": "input_audio", "input_audio": {"data": audio.data, "format": audio.format}}
        case FilePart(file=file):
            if not file.file_data and not file.file_id:
                raise InvalidRequest("A file needs file_data or a file_id.", param=f"{at}.file")
            fields = {"file_data": file.file_data, "file_id": file.file_id, "filename": file.filename}
            return {"type": "input_file"} | {name: value for name, value in fields.items() if value is not None}
        case _:
            assert_never(part)


def _named(content: str | list[Item], name: str | None, index: int) -> str | list[Item]:
    if name is None:
        return content
    if isinstance(content, str):
        return NamedText(content, name)
    for part in content:
        if part["type"] == "input_text":
            part["text"] = NamedText(part["text"], name)
            return content
    raise UnsupportedParameter(
        f"messages[{index}].name needs a text part to travel with; leave it out.", param=f"messages[{index}].name"
    )
