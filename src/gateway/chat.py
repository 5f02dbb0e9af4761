"""The Chat Completions request as official clients send it: decoded once, at the edge.

Field names and shapes follow the official ``POST /chat/completions`` document (openai-openapi 2.3.0).
`decode_body` judges the JSON itself (duplicate keys, NaN, UTF-8, depth); `decode_chat` judges every field for
an agent; a raw upstream model gets a `RelayRequest`, whose untouched fields are raw slices of the body.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.errors import InvalidRequest, UnsupportedParameter, UnsupportedValue

CHAT_PATH = "/chat/completions"
COMPLETIONS_PATH = "/completions"
EMBEDDINGS_PATH = "/embeddings"
STREAMED_PATHS = frozenset({CHAT_PATH, COMPLETIONS_PATH})
"""Where ``stream`` and ``stream_options`` mean something to the gateway."""

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class TextPart(Struct, tag_field="type", tag="text", frozen=True):
    """``{"type": "text", "text": …}``."""

    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal", frozen=True):
    """``{"type": "refusal", "refusal": …}``."""

    refusal: str


class ImageUrl(Struct, frozen=True):
    """An http(s) or data URL; an upstream is never handed the name of a file."""

    url: Annotated[str, Meta(pattern=r"^(?i:https?://|data:)")]
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Struct, tag_field="type", tag="image_url", frozen=True):
    """``{"type": "image_url", "image_url": {"url": …}}``."""

    image_url: ImageUrl


class InputAudio(Struct, frozen=True):
    """Base64 audio."""

    data: str
    format: str


class AudioPart(Struct, tag_field="type", tag="input_audio", frozen=True):
    """``{"type": "input_audio", "input_audio": {…}}``."""

    input_audio: InputAudio


class FileData(Struct, frozen=True):
    """A file by content (base64 data URL) or by an upstream's file id."""

    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(Struct, tag_field="type", tag="file", frozen=True):
    """``{"type": "file", "file": {…}}``."""

    file: FileData


UserPart = TextPart | ImagePart | AudioPart | FilePart


class FunctionCall(Struct, frozen=True):
    """Name and JSON arguments (as text) of a call."""

    name: str
    arguments: str


class CustomCall(Struct, frozen=True):
    """Name and free-form input of a custom tool's call."""

    name: str
    input: str


class FunctionToolCall(Struct, frozen=True, tag_field="type", tag="function"):
    """A call the assistant made earlier."""

    id: str
    function: FunctionCall


class CustomToolCall(Struct, frozen=True, tag_field="type", tag="custom"):
    """A call of a custom tool the assistant made earlier."""

    id: str
    custom: CustomCall


class SystemMessage(Struct, tag_field="role", tag="system", frozen=True):
    """Instructions of the client."""

    content: str | list[TextPart]
    name: str | None = None


class DeveloperMessage(Struct, tag_field="role", tag="developer", frozen=True):
    """Instructions of the client, in the newer role."""

    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Struct, tag_field="role", tag="user", frozen=True):
    """What the person said."""

    content: str | list[UserPart]
    name: str | None = None


class AssistantMessage(Struct, tag_field="role", tag="assistant", frozen=True):
    """An earlier answer; ``content`` may be null beside ``tool_calls``."""

    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[FunctionToolCall | CustomToolCall] | None = None
    function_call: FunctionCall | None = None


class ToolMessage(Struct, tag_field="role", tag="tool", frozen=True):
    """The result of a call the client ran."""

    tool_call_id: str
    content: str | list[TextPart] | None = None


class FunctionMessage(Struct, tag_field="role", tag="function", frozen=True):
    """The result of a call in the deprecated ``functions`` dialect."""

    name: str
    content: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


class FunctionDefinition(Struct, frozen=True):
    """A tool the client offers: name, JSON Schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolParam(Struct, tag_field="type", tag="function", frozen=True):
    """``{"type": "function", "function": {…}}``."""

    function: FunctionDefinition


class CustomToolParam(Struct, tag_field="type", tag="custom", frozen=True):
    """``{"type": "custom", "custom": {…}}``: refused for agents."""

    custom: dict[str, Any]


class NamedFunction(Struct, frozen=True):
    """A function by name."""

    name: str


class NamedToolChoice(Struct, tag_field="type", tag="function", frozen=True):
    """``tool_choice`` that names one function."""

    function: NamedFunction


class AllowedTools(Struct, frozen=True):
    """A subset of the offered tools."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class AllowedToolsChoice(Struct, tag_field="type", tag="allowed_tools", frozen=True):
    """``tool_choice`` that restricts the offer: refused for agents."""

    allowed_tools: AllowedTools


class CustomToolChoice(Struct, tag_field="type", tag="custom", frozen=True):
    """``tool_choice`` that names a custom tool: refused for agents."""

    custom: dict[str, Any]


class JsonSchemaFormat(Struct, frozen=True):
    """A named JSON Schema for the answer."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(Struct, tag_field="type", tag="text", frozen=True):
    """Plain text."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", frozen=True):
    """Any JSON object."""


class JsonSchemaResponseFormat(Struct, tag_field="type", tag="json_schema", frozen=True):
    """JSON that fits a schema."""

    json_schema: JsonSchemaFormat


class StreamOptions(Struct, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(Struct, frozen=True, kw_only=True):
    """A chat request for an agent, every official field typed; ``extra`` holds unknown top-level fields.

    Unknown fields (vLLM's ``top_k``, LM Studio's ``ttl`` …) travel to the agent's upstream unchanged.
    """

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    audio: dict[str, Any] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    function_call: Any = None
    functions: list[dict[str, Any]] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    moderation: dict[str, Any] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaResponseFormat | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    service_tier: str | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | CustomToolChoice | None
    ) = None
    tools: list[FunctionToolParam | CustomToolParam] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    user: str | dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: dict[str, Any] | None = None
    extra: dict[str, Any] = {}


OFFICIAL_FIELDS = frozenset(f.name for f in msgspec.structs.fields(ChatRequest)) - {"extra"}


class RelayRequest(Struct, frozen=True, kw_only=True):
    """A request for a raw upstream model: only what the gateway must know; the rest is relayed as it came.

    ``path`` follows the upstream's base URL.
    """

    model: str
    fields: dict[str, Raw]
    stream: bool = False
    include_usage: bool = False
    path: str = CHAT_PATH


class _Key(str):
    """A top-level key, equal to itself alone: one that comes twice is in a dict twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


_MOST_FIELDS = 1_000
"""Each costs a microsecond of the loop, several times over."""
_SMALL = 65_536
"""A body in which there is no room for so many fields that decoding them all takes long."""


def decode_body(body: bytes) -> dict[str, Raw]:
    """Split a JSON object into raw top-level slices.

    Raises `InvalidRequest` for what is not one JSON object: bad UTF-8, NaN, a depth beyond the parser's limit,
    trailing bytes, more top-level fields than any request has, and duplicate keys however they are escaped (the last
    one winning would let a request name another model than the one that is judged).
    """
    try:
        if not body.isascii():
            body.decode()
        given = _FIELDS.decode(body) if len(body) <= _SMALL else _decode_counted(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8 (byte {error.start}).") from error
    except msgspec.ValidationError as error:
        raise InvalidRequest("The request body must be one JSON object.") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {_tidy(error)}.") from error
    except RecursionError as error:
        raise InvalidRequest("The request body is nested too deeply.") from error
    if len(given) > _MOST_FIELDS:
        raise _too_many_fields()
    fields = dict(zip(map(str, given), given.values(), strict=True))
    if len(fields) != len(given):
        raise InvalidRequest("The request body names a top-level key more than once; send each key once.")
    return fields


def _decode_counted(body: bytes) -> dict[_Key, Raw]:
    """Decode as far as there are not too many fields: of a large body they would hold up the loop."""
    seen = 0

    def count(_: type, key: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > _MOST_FIELDS:
            raise _too_many_fields()
        return _Key(key)

    return msgspec.json.decode(body, type=dict[_Key, Raw], dec_hook=count)


def _too_many_fields() -> InvalidRequest:
    return InvalidRequest(f"The request body has more than {_MOST_FIELDS:,} top-level fields.")


def decode_model(fields: Mapping[str, Raw]) -> str:
    """Return the ``model`` field, or raise `InvalidRequest` with ``param: model``."""
    raw = fields.get("model")
    if raw is None:
        raise InvalidRequest("you must provide a model parameter", param="model")
    model: str = _decode(raw, _STRING, "model")
    return model


def decode_value(raw: Raw, name: str) -> Any:
    """Return a field's value, whatever it is; raise `InvalidRequest` for what JSON allows and Python cannot hold."""
    return _decode(raw, _ANYTHING, name)


def decode_flag(fields: Mapping[str, Raw], name: str) -> bool:
    """Return an optional boolean top-level field; absent and null are False."""
    raw = fields.get(name)
    return bool(_decode(raw, _FLAG, name)) if raw is not None else False


def decode_relay(model: str, fields: dict[str, Raw], path: str = CHAT_PATH) -> RelayRequest:
    """Decode what a relayed request needs; every other field stays a raw slice."""
    if path not in STREAMED_PATHS:
        return RelayRequest(model=model, fields=fields, path=path)
    options = fields.get("stream_options")
    parsed = _decode(options, _STREAM_OPTIONS, "stream_options") if options is not None else None
    return RelayRequest(
        model=model,
        fields=fields,
        stream=decode_flag(fields, "stream"),
        include_usage=bool(parsed and parsed.include_usage),
        path=path,
    )


def decode_chat(body: bytes, fields: Mapping[str, Raw]) -> ChatRequest:
    """Judge every field of a chat request for an agent.

    Raises `InvalidRequest` (or `UnsupportedParameter` / `UnsupportedValue`) naming the field.
    """
    try:
        request: ChatRequest = _CHAT.decode(body)
    except msgspec.ValidationError as error:
        raise _as_invalid_request(error) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {_tidy(error)}.") from error
    _check_agent_fields(request)
    extra = {str(key): decode_value(raw, str(key)) for key, raw in fields.items() if key not in OFFICIAL_FIELDS}
    return msgspec.structs.replace(request, extra=extra)


_CHAT = msgspec.json.Decoder(ChatRequest)
_FIELDS = msgspec.json.Decoder(dict[_Key, Raw], dec_hook=str.__new__)
_STRING = msgspec.json.Decoder(str)
_FLAG = msgspec.json.Decoder(bool | None)
_STREAM_OPTIONS = msgspec.json.Decoder(StreamOptions | None)
_ANYTHING = msgspec.json.Decoder()
_PATH = re.compile(r" - at `\$\.?(.*?)`$")


def _decode(raw: Raw, decoder: msgspec.json.Decoder[Any], name: str) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"Invalid value for '{name}': {_tidy(error)}.", param=name) from error


def _tidy(error: Exception) -> str:
    text = _PATH.sub("", str(error)).replace("`", "'")
    if text.startswith("Invalid value '"):
        return "it is none of the values allowed"  # what was sent is not repeated: errors are kept in many logs
    return text.removeprefix("JSON is malformed: ")


def _as_invalid_request(error: msgspec.ValidationError) -> InvalidRequest:
    found = _PATH.search(str(error))
    path = found.group(1) if found else ""
    missing = re.match(r"Object missing required field `(\w+)`", str(error))
    if missing:
        name = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return InvalidRequest(f"Invalid value for '{path}': {_tidy(error)}.", param=path or None)


def _check_agent_fields(request: ChatRequest) -> None:
    if request.n not in (None, 1):
        raise UnsupportedValue(
            "An agent gives one answer per request: its tools would run once per choice. Send n=1 and repeat the "
            "request for more answers.",
            param="n",
        )
    if request.functions is not None or request.function_call is not None:
        raise UnsupportedParameter(
            "'functions' and 'function_call' are deprecated and not served for agents. Send 'tools' and 'tool_choice'.",
            param="functions" if request.functions is not None else "function_call",
        )
    if request.audio is not None or (request.modalities and "audio" in request.modalities):
        raise UnsupportedParameter(
            "Agents answer in text. Leave 'audio' out and send modalities=['text'].",
            param="audio" if request.audio is not None else "modalities",
        )
    if request.logprobs or request.top_logprobs:
        raise UnsupportedParameter(
            "'logprobs' has no meaning for an agent, whose answer is made by several model calls. Ask a raw upstream "
            "model for log probabilities.",
            param="logprobs" if request.logprobs else "top_logprobs",
        )
    if request.store:
        raise UnsupportedValue(
            "This gateway does not store chat completions for later retrieval. Send store=false.", param="store"
        )
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, CustomToolParam):
            raise UnsupportedValue(
                "Custom tools are not served for agents. Send a tool of type 'function'.", param=f"tools[{index}].type"
            )
    if isinstance(request.tool_choice, AllowedToolsChoice | CustomToolChoice):
        raise UnsupportedValue(
            "For agents, tool_choice is 'none', 'auto', 'required' or one function by name.", param="tool_choice"
        )
    names = [tool.function.name for tool in request.tools or () if isinstance(tool, FunctionToolParam)]
    if isinstance(request.tool_choice, NamedToolChoice) and request.tool_choice.function.name not in names:
        near = difflib.get_close_matches(request.tool_choice.function.name, names, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise InvalidRequest(
            f"tool_choice names '{request.tool_choice.function.name}', which is not in 'tools'.{hint}",
            param="tool_choice",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        value = getattr(request, name)
        if value is not None and not math.isfinite(value):
            raise InvalidRequest(f"'{name}' must be a finite number.", param=name)
