"""The script language of the obedient upstream: what a model would answer is written in the user's message.

Turns are parted by ``;;`` (``;;;`` inside the arguments of a call, for an inner agent); the turn to play is the
number of assistant messages with tool calls since the last user message, so one server plays any number of
conversations at once and keeps no state. A turn is::

    [options] say some words            text, streamed word by word
    [options] call NAME {json}          a tool call; several are joined by ``&&``
    [options] echo                      the text of the tool results since the user's message

A line ``word> …`` is played only for a request whose system prompt contains the word (``judge> say {…}``).
Options: ``delay=S`` between chunks, ``wait=S`` before the answer, ``finish=REASON``, ``think=WORD`` (visible reasoning
before the text), ``refusal=WORD``, ``usage=none``, ``hold=N`` (stop after N chunks until released), ``status=CODE``,
``code=…``, ``param=…``, ``retry=…``, ``fault=NAME`` and ``at=N`` (the chunk at which the fault strikes).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

DEFAULT = "say Hello from the upstream."


@dataclass(frozen=True)
class Turn:
    """What to answer to one request."""

    text: str | None = None
    calls: tuple[tuple[str, str], ...] = ()
    options: dict[str, str] = field(default_factory=dict)

    @property
    def finish(self) -> str:
        """The finish reason."""
        return self.options.get("finish") or ("tool_calls" if self.calls else "stop")

    def seconds(self, name: str) -> float:
        """A duration among the options."""
        return float(self.options.get(name, 0))

    @property
    def fault(self) -> str | None:
        """The fault to commit, if any."""
        return self.options.get("fault")


def read_turn(request: dict[str, Any]) -> Turn:
    """Return the turn that the conversation asks for."""
    messages = request.get("messages", [])
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=-1)
    text = _text(messages[last].get("content")) if last >= 0 else ""
    after = messages[last + 1 :]
    script = _script_for(text, " ".join(_text(m.get("content")) for m in messages if m.get("role") == "system"))
    turns = [turn.strip() for turn in re.split(r"(?<!;);;(?!;)", script)]
    if len(turns) == 1:
        turns = [turn.strip() for turn in script.split(";;;")]
    played = sum(1 for m in after if m.get("role") == "assistant" and m.get("tool_calls"))
    results = [_text(m.get("content")) for m in after if m.get("role") == "tool"]
    return _parse(turns[min(played, len(turns) - 1)], results)


def _script_for(text: str, system: str) -> str:
    script = None
    for line in text.split("\n"):
        found = re.match(r"(\w+)> (.*)", line)
        if found and re.search(rf"\b{found.group(1)}\b", system):
            return found.group(2)
        if not found and script is None and re.match(r"(\[|say\b|call |echo)", line):
            script = line
    return script or DEFAULT


def _parse(turn: str, results: list[str]) -> Turn:
    options: dict[str, str] = {}
    found = re.match(r"\[([^\]]*)\]\s*", turn)
    if found:
        options = dict(part.split("=", 1) for part in found.group(1).split())
        turn = turn[found.end() :]
    text: str | None = None
    calls: list[tuple[str, str]] = []
    for part in (part.strip() for part in turn.split("&&")):
        if part.startswith("call "):
            name, _, arguments = part.removeprefix("call ").partition(" ")
            calls.append((name, arguments.strip() or "{}"))
        elif part == "echo":
            text = " / ".join(results)
        elif part.startswith("say"):
            text = part.removeprefix("say").strip()
    return Turn(text, tuple(calls), options)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


def tokens(text: str) -> list[str]:
    """Split a text into the pieces it is streamed in."""
    return re.findall(r"\S+\s*", text)


def arguments_pieces(arguments: str) -> list[str]:
    """Split a call's arguments the way models stream them."""
    return [arguments[i : i + 7] for i in range(0, len(arguments), 7)] or [""]


def completion(request: dict[str, Any], turn: Turn, number: int) -> dict[str, Any]:
    """The whole answer as one ``chat.completion``."""
    refusal = turn.options.get("refusal")
    message: dict[str, Any] = {"role": "assistant", "content": None if refusal else turn.text, "refusal": refusal}
    if "think" in turn.options:
        message["reasoning_content"] = turn.options["think"]
    if turn.calls:
        message["tool_calls"] = [
            {"id": f"call_{number}_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(turn.calls)
        ]
    body = {
        "id": f"chatcmpl-up{number}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": request.get("model", "none"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": turn.finish}],
        "usage": usage(turn),
    }
    if turn.options.get("usage") == "none":
        del body["usage"]
    return body


def chunks(request: dict[str, Any], turn: Turn, number: int) -> list[dict[str, Any]]:
    """The answer as chunks, the usage chunk included where the request asks for it."""
    base = {
        "id": f"chatcmpl-up{number}",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": request.get("model", "none"),
        "system_fingerprint": "fp_obedient",
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return base | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    out = [chunk({"role": "assistant", "content": None if turn.calls and not turn.text else ""})]
    if "think" in turn.options:
        out.append(chunk({"reasoning_content": turn.options["think"]}))
    if "refusal" in turn.options:
        out.append(chunk({"refusal": turn.options["refusal"]}))
    else:
        out += [chunk({"content": piece}) for piece in tokens(turn.text or "")]
    for index, (name, arguments) in enumerate(turn.calls):
        head = {"index": index, "id": f"call_{number}_{index}", "type": "function"}
        out.append(chunk({"tool_calls": [head | {"function": {"name": name, "arguments": ""}}]}))
        out += [
            chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
            for piece in arguments_pieces(arguments)
        ]
    if turn.fault != "nofinish":
        out.append(chunk({}, turn.finish))
    if (request.get("stream_options") or {}).get("include_usage") and turn.options.get("usage") != "none":
        out.append(base | {"choices": [], "usage": usage(turn)})
    return out


def usage(turn: Turn) -> dict[str, Any]:
    """Ten tokens in, one per word (or call) out."""
    count = len(tokens(turn.text or "")) + len(turn.calls)
    return {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}


def dump(value: Any) -> bytes:
    """Encode compactly."""
    return json.dumps(value, separators=(",", ":")).encode()
