"""What the demo model says and which tools it calls: plain rules over the words of the last user message.

Deterministic, and only as clever as it takes to exercise a real agent: tool calls with arguments that fit their JSON
Schema, parallel calls, handoffs, structured output. It says of itself that it is a script.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

HANDOFF_PREFIX = "transfer_to_"

SELF_DESCRIPTION = (
    "I am the gateway's built-in demo model, a small script that can call tools. Set OPENAI_API_KEY or add an upstream "
    "to upstreams.yaml to talk to a real one."
)


@dataclass(frozen=True, slots=True)
class ToolOffer:
    """A function the request offers."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered since the last user message."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the script looks at. ``forced`` is a tool's name, ``"*"`` for "some tool", or None."""

    text: str
    tools: Sequence[ToolOffer] = ()
    results: Sequence[ToolResult] = ()
    handed_off: frozenset[str] = frozenset()
    forced: str | None = None
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    json_object: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: name and JSON arguments."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model does next: text, or calls."""

    text: str = ""
    calls: tuple[Call, ...] = field(default=())


def answer(situation: Situation) -> Answer:
    """Decide the next step of the conversation."""
    if not situation.results:
        calls = _calls(situation)
        if calls:
            return Answer(calls=calls)
    if situation.schema is not None:
        source = " ".join(result.text for result in situation.results) or situation.text
        value = _Filler(situation.schema, source).value(situation.schema, "answer")
        return Answer(msgspec.json.encode(value).decode())
    text = _text(situation)
    if situation.json_object:
        return Answer(msgspec.json.encode({"answer": text}).decode())
    return Answer(text)


def words_of(text: str) -> list[str]:
    """Split text into the pieces that are streamed and counted as tokens; joined they are the text again."""
    return re.findall(r"\s*\S+|\s+$", text)


_STOP_WORDS = frozenset(
    """
    a about agent all also an and any are as assistant at be by can could current do does find for from get give given
    handle handles handoff has have hello help hi how i in into is it its look make me my named of on or please request
    return returns run say should show task tell text that the their this to tool transfer use user using value what
    when where which who will with would you your
    """.split()  # noqa: SIM905 — a list of words reads as words
)
_GREETINGS = {"hola": "spanish", "bonjour": "french", "hallo": "german", "guten": "german", "ciao": "italian"}
_PLACE = re.compile(r"\b(?:in|at|for|near|from|to|of)\s+((?:[A-ZÀ-Þ][\w'’.-]*)(?:\s+(?:de\s+)?[A-ZÀ-Þ][\w'’-]*)*)")
_ALSO = re.compile(r"\s*(?:,|and|or|&|,\s*and)\s+((?:[A-ZÀ-Þ][\w'’-]*)(?:\s+[A-ZÀ-Þ][\w'’-]*)*)")
_CAPITALISED = re.compile(r"(?<![.?!]\s)(?<!^)\b([A-ZÀ-Þ][\w'’-]*(?:\s+[A-ZÀ-Þ][\w'’-]*)*)")
_QUOTED = re.compile(r"[\"“”'‘]([^\"“”'‘’]{1,200})[\"“”'’]")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_EXPRESSION = re.compile(r"[-(]*\d[\d\s.+*/()^%-]*\d\)?|\d+")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")
_URL = re.compile(r"https?://[^\s<>\"']+")
_DATE = re.compile(r"\b\d{4}-\d{2}-\d{2}\b|\b(?:today|tomorrow|yesterday|tonight|now)\b", re.IGNORECASE)
_WHOLE_TEXT = frozenset(
    {"query", "question", "text", "message", "input", "prompt", "content", "body", "request", "reason"}
)
_LONGEST_ECHO = 300


def _text(situation: Situation) -> str:
    if situation.results:
        said = " ".join(_sentence(result.text) for result in situation.results)
        names = ", ".join(dict.fromkeys(result.name for result in situation.results if result.name))
        return f"{said} (The demo model read this from {names or 'a tool'}.)"
    heard = " ".join(situation.text.split())
    heard = heard if len(heard) <= _LONGEST_ECHO else heard[: _LONGEST_ECHO - 1] + "…"
    offers = [tool.name for tool in situation.tools if not tool.name.startswith(HANDOFF_PREFIX)][:8]
    can = f" Here I can call: {', '.join(offers)}." if offers else ""
    return f"You said: {heard or 'nothing'!s}. {SELF_DESCRIPTION}{can}".replace("?.", "?").replace("!.", "!")


def _sentence(text: str) -> str:
    text = text.strip() or "The tool gave no result"
    return text if text[-1] in '.!?…}])"' else f"{text}."


def _calls(situation: Situation) -> tuple[Call, ...]:
    tools = [tool for tool in situation.tools if tool.name not in situation.handed_off]
    if not tools or situation.forced == "":
        return ()
    if situation.forced not in (None, "*"):
        tools = [tool for tool in tools if tool.name == situation.forced]
        chosen = tools[:1]
    else:
        chosen = _best(situation.text, tools)
        if not chosen and situation.forced == "*":
            chosen = tools[:1]
    if not situation.parallel:
        chosen = chosen[:1]
    calls: list[Call] = []
    for tool in chosen:
        texts = _clauses(situation.text, tool) if situation.parallel else [situation.text]
        if len(chosen) > 1:
            texts = [_from_mention(situation.text, tool)]
        for text in texts:
            value = _Filler(tool.parameters, text).value(tool.parameters, tool.name)
            arguments = value if isinstance(value, dict) else {}
            calls.append(Call(tool.name, msgspec.json.encode(arguments).decode()))
    return tuple(calls)


def _best(text: str, tools: Sequence[ToolOffer]) -> list[ToolOffer]:
    """Return the tools whose names the message mentions, else the one whose description fits best."""
    heard = _stems(text)
    handoffs = [tool for tool in tools if tool.name.startswith(HANDOFF_PREFIX)]
    plain = [tool for tool in tools if not tool.name.startswith(HANDOFF_PREFIX)]
    chosen: list[ToolOffer] = []
    used: set[str] = set()
    for tool in sorted(plain, key=lambda tool: -len(heard & _stems(_spaced(tool.name)))):
        mentioned = heard & _stems(_spaced(tool.name))
        # Tools that share a word ("search_web", "search_files") are rivals; different words ask for both.
        if mentioned and not mentioned & used:
            chosen.append(tool)
            used |= mentioned
    return chosen[:4] or _best_described(heard, handoffs) or _best_described(heard, plain) or _evident(text, plain)


def _best_described(heard: set[str], tools: Sequence[ToolOffer]) -> list[ToolOffer]:
    best: list[ToolOffer] = []
    most = 0
    for tool in tools:
        score = len(heard & _stems(f"{_spaced(tool.name)} {tool.description} {_property_words(tool)}"))
        if score > most:
            best, most = [tool], score
    return best


def _property_words(tool: ToolOffer) -> str:
    properties = tool.parameters.get("properties")
    if tool.name.startswith(HANDOFF_PREFIX) or not isinstance(properties, dict):
        return ""
    return " ".join(map(_spaced, properties))


def _evident(text: str, tools: Sequence[ToolOffer]) -> list[ToolOffer]:
    """Return the only tool if the message holds what its arguments want, such as a sum for a calculator."""
    properties = tools[0].parameters.get("properties") if len(tools) == 1 else None
    if not isinstance(properties, dict) or not _NUMBER.search(text):
        return []
    kinds = {schema.get("type") for schema in properties.values() if isinstance(schema, dict)}
    return list(tools) if kinds & {"number", "integer"} else []


def _from_mention(text: str, tool: ToolOffer) -> str:
    stems = _stems(_spaced(tool.name))
    for match in re.finditer(r"\w+", text):
        if _stem(match.group().lower()) in stems:
            return text[match.start() :]
    return text


def _clauses(text: str, tool: ToolOffer) -> list[str]:
    """Return one text per call: "weather in Paris and London" asks a one-argument tool twice."""
    properties = tool.parameters.get("properties")
    if not isinstance(properties, dict) or len(properties) != 1:
        return [text]
    (name, schema), *_ = properties.items()
    if not isinstance(schema, dict) or schema.get("type") != "string" or not _is_place(name):
        return [text]
    places = _places(text)
    return [f"in {place}" for place in places[:4]] if len(places) > 1 else [text]


def _places(text: str) -> list[str]:
    places: list[str] = []
    for match in _PLACE.finditer(text):
        places.append(match.group(1))
        end = match.end()
        while also := _ALSO.match(text, end):
            places.append(also.group(1))
            end = also.end()
    return list(dict.fromkeys(place.rstrip(".") for place in places))


def _is_place(name: str) -> bool:
    return bool(
        set(_spaced(name).split()) & {"city", "location", "place", "town", "country", "region", "destination", "origin"}
    )


def _spaced(name: str) -> str:
    """Return the words of an identifier: ``transfer_to_billing_agent``, ``getWeather`` …"""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.removeprefix(HANDOFF_PREFIX))
    return re.sub(r"[_-]", " ", spaced).lower()


def _stems(text: str) -> set[str]:
    words = [_GREETINGS.get(word, word) for word in re.findall(r"[^\W_]+", text.lower())]
    return {_stem(word) for word in words if word not in _STOP_WORDS and len(word) > 1}


def _stem(word: str) -> str:
    for ending in ("ing", "ies", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class _Filler:
    """Makes a small value that fits a JSON Schema out of the words of a message."""

    def __init__(self, root: Mapping[str, Any], text: str) -> None:
        self._root = root
        self._text = text
        self._numbers = [float(number) for number in _NUMBER.findall(text)]
        self._depth = 0

    def value(self, schema: Any, name: str) -> Any:
        schema = self._resolve(schema)
        if "const" in schema:
            return schema["const"]
        options = schema.get("enum")
        if isinstance(options, list) and options:
            return self._option(options)
        for key in ("anyOf", "oneOf"):
            variants = schema.get(key)
            if isinstance(variants, list) and variants:
                typed = [v for v in variants if not (isinstance(v, dict) and v.get("type") == "null")]
                return self.value(typed[0], name) if typed else None
        merged = schema.get("allOf")
        if isinstance(merged, list) and merged:
            return self.value(merged[0], name)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema)
        if kind == "array":
            return self._array(schema, name)
        if kind == "boolean":
            return bool(set(_stems(_spaced(name))) & _stems(self._text))
        if kind in ("integer", "number"):
            return self._number(schema, kind)
        if kind == "null":
            return None
        return self._string(schema, name)

    def _resolve(self, schema: Any) -> Mapping[str, Any]:
        for _ in range(16):
            if not isinstance(schema, dict):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#/"):
                return schema
            target: Any = self._root
            for part in reference[2:].split("/"):
                target = target.get(part) if isinstance(target, dict) else None
            schema = target
        return {}

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        properties = schema.get("properties")
        if not isinstance(properties, dict) or self._depth >= 8:
            return {}
        required = schema.get("required")
        wanted: Iterable[str] = required if isinstance(required, list) else ()
        self._depth += 1
        try:
            return {
                name: self.value(item, name)
                for name, item in properties.items()
                if name in wanted or self._is_mentioned(name, item)
            }
        finally:
            self._depth -= 1

    def _is_mentioned(self, name: str, schema: Any) -> bool:
        """Whether an optional argument has something to hold."""
        resolved = self._resolve(schema)
        options = resolved.get("enum")
        if isinstance(options, list):
            return any(str(option).lower() in self._text.lower() for option in options)
        if _is_place(name):
            return bool(_places(self._text))
        return bool(_stems(_spaced(name)) & _stems(self._text))

    def _array(self, schema: Mapping[str, Any], name: str) -> list[Any]:
        items = self._resolve(schema.get("items"))
        smallest = schema.get("minItems")
        count = min(smallest, 16) if isinstance(smallest, int) else 0
        if self._depth >= 8:
            return []
        if items.get("type") in ("number", "integer"):
            found: list[Any] = [int(n) if items["type"] == "integer" else n for n in self._numbers]
            self._numbers = []
        elif items.get("type") == "string" and "enum" not in items:
            found = list(_places(self._text)) or [self._string(items, name)]
        else:
            self._depth += 1
            found = [self.value(items, name)]
            self._depth -= 1
        while found and len(found) < count:
            found.append(found[-1])
        largest = schema.get("maxItems")
        return found[:largest] if isinstance(largest, int) else found

    def _number(self, schema: Mapping[str, Any], kind: str) -> int | float:
        default = schema.get("default")
        value = self._numbers.pop(0) if self._numbers else default if isinstance(default, int | float) else 1
        for key, bound in (("minimum", max), ("maximum", min)):
            limit = schema.get(key)
            if isinstance(limit, int | float):
                value = bound(value, limit)
        return int(value) if kind == "integer" or float(value).is_integer() else value

    def _option(self, options: list[Any]) -> Any:
        lowered = self._text.lower()
        return next((option for option in options if str(option).lower() in lowered), options[0])

    def _string(self, schema: Mapping[str, Any], name: str) -> str:
        text = self._pick(name, schema.get("format"))
        longest = schema.get("maxLength")
        return text[:longest] if isinstance(longest, int) and longest >= 0 else text

    def _pick(self, name: str, format_: Any) -> str:
        text = self._text.strip()
        hints = set(_spaced(name).split())
        if format_ == "date":
            found = re.search(r"\d{4}-\d{2}-\d{2}", text)
            return found.group() if found else "2025-01-01"
        if format_ == "date-time":
            return "2025-01-01T00:00:00Z"
        for wanted, pattern in (("email", _EMAIL), ("url", _URL), ("uri", _URL), ("date", _DATE), ("day", _DATE)):
            if wanted in hints or format_ == wanted:
                match = pattern.search(text)
                if match:
                    return match.group()
        if hints & {"expression", "formula", "equation", "calculation"}:
            expressions = _EXPRESSION.findall(text)
            if expressions:
                return str(max(expressions, key=len)).strip()
        if _is_place(name):
            return (_places(text) or _CAPITALISED.findall(text) or [_last_word(text)])[0]
        quoted = _QUOTED.search(text)
        if quoted:
            return quoted.group(1)
        if hints & _WHOLE_TEXT:
            return text
        mention = rf"\b{re.escape(_spaced(name))}\b\s*(?:is|=|:|of|number|no\.?|#)?\s*([\w@./#-]+)"
        after = re.search(mention, text, re.IGNORECASE)
        if after:
            return after.group(1).rstrip(".")
        if hints & {"id", "number", "code"} and (match := re.search(r"\b[A-Za-z]*-?\d[\w-]*\b", text)):
            return match.group()
        if hints & {"name", "person", "user", "customer", "language", "topic", "subject", "who"}:
            capitalised = _CAPITALISED.findall(text)
            if capitalised:
                return str(capitalised[-1])
            return _last_word(text)
        return text


def _last_word(text: str) -> str:
    words = re.findall(r"\w[\w'’-]*", text)
    return words[-1] if words else "demo"
