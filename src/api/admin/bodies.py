"""What the plain routes are asked, as JSON Schema for the OpenAPI document: bodies by action, and parameters."""

from __future__ import annotations

from typing import Any

import msgspec

from api.mcp.approval import ApproveRequest
from api.tools import InvokeRequest
from gateway.chat import ChatRequest
from gateway.security.keybook import GRACE_S, LONGEST_GRACE_S
from gateway.security.stored import KEY_ID, KeyOptions
from gateway.usage.question import GROUP_NAMES

_JSON, _FORM = "application/json", "multipart/form-data"
_STRUCTS: tuple[type[msgspec.Struct], ...] = (ChatRequest, InvokeRequest, ApproveRequest, KeyOptions)
_MODEL = {"type": "string", "description": "`upstream/model`, an alias or a virtual model: never an agent."}
_FILE = {"type": "string", "format": "binary"}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array"}]}


def _object(
    required: dict[str, Any], optional: dict[str, Any] | None = None, *, is_open: bool = True
) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": is_open,
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_EXPIRY = {"type": ["string", "null"], "description": "2030-12-31 (its last second) or 2030-12-31T12:00:00Z."}
_GRACE = {"type": "number", "minimum": 0, "maximum": LONGEST_GRACE_S, "default": GRACE_S}
_MESSAGE = _object(
    {"jsonrpc": {"const": "2.0"}, "method": {"type": "string"}},
    {"id": {"type": ["string", "integer"]}, "params": {"type": "object"}},
)
_PICTURE = {"prompt": {"type": "string"}}

_TOOL_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_ENTRY = {
    "url": {"type": "string", "description": "Of http and mcp."},
    "document": {"type": "string", "description": "Of openapi: its address."},
    "headers": {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "Values, or `env:NAME` of a variable that `registration.secrets` of tools.yaml lists.",
    },
}
"""Some keys of an entry; all of them are in docs/references/tools-yaml.md."""

BODIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "chat.completions.create": (True, {_JSON: _ref("ChatRequest")}),
    "completions.create": (
        True,
        {_JSON: _object({"model": _MODEL}, {"prompt": _TEXTS, "stream": {"type": ["boolean", "null"]}})},
    ),
    "embeddings.create": (True, {_JSON: _object({"model": _MODEL}, {"input": _TEXTS})}),
    "audio.speech": (True, {_JSON: _object({"model": _MODEL}, {"input": {"type": "string"}})}),
    "audio.transcriptions": (True, {_FORM: _object({"model": _MODEL}, {"file": _FILE})}),
    "audio.translations": (True, {_FORM: _object({"model": _MODEL}, {"file": _FILE})}),
    "images.generate": (True, {_JSON: _object({}, {"model": _MODEL, **_PICTURE})}),
    "images.edit": (True, {_FORM: _object({}, {"model": _MODEL, "image": _FILE, **_PICTURE})}),
    "images.vary": (True, {_FORM: _object({}, {"model": _MODEL, "image": _FILE})}),
    "moderations.create": (True, {_JSON: _object({}, {"model": _MODEL, "input": _TEXTS})}),
    "files.create": (True, {_FORM: _object({}, {"file": _FILE, "purpose": {"type": "string"}})}),
    "batches.create": (True, {_JSON: _object({}, {"input_file_id": {"type": "string"}})}),
    "batches.cancel": (False, {_JSON: {"type": "object"}}),
    "tools.register": (
        True,
        {_JSON: _object({"name": _TOOL_NAME, "provider": {"enum": ["http", "openapi", "mcp"]}}, _ENTRY)},
    ),
    "tools.servers.register": (
        True,
        {_JSON: _object({"name": _TOOL_NAME, "url": _ENTRY["url"]}, {"headers": _ENTRY["headers"]})},
    ),
    "tools.invoke": (False, {_JSON: _ref("InvokeRequest")}),
    "tools.mcp.approve": (True, {_JSON: _ref("ApproveRequest")}),
    "security.keys.create": (True, {_JSON: _ref("NewKey")}),
    "security.keys.rotate": (False, {_JSON: _object({}, {"grace_s": _GRACE}, is_open=False)}),
    "mcp.message": (True, {_JSON: _MESSAGE}),
}
"""By action: whether there has to be a body, and its schema by media type. Bodies of upstreams go there as they are."""

_UPSTREAM = {
    "name": "x-gateway-upstream",
    "in": "header",
    "schema": {"type": "string"},
    "description": "The upstream that shall answer, for keys that reach all of it.",
}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}


_TIME = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}

PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "tools.search": [
        {**_query("query", {"type": "string"}, "Words of the tool's name or description."), "required": True},
        _query("max_results", {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}, "The most to list."),
    ],
    "usage.read": [
        _query("from", _TIME, "2030-12-31 or 2030-12-31T12:00:00Z; 30 days ago where left out."),
        _query("to", _TIME, "The end, not included; now where left out."),
        _query("group_by", {"type": "string"}, f"Some of {', '.join(GROUP_NAMES)}, with commas."),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 1_000, "default": 100}, "Groups in one answer."),
        _query("offset", {**_COUNT, "maximum": 10**9, "default": 0}, "Groups to leave out at the start."),
        *(_query(name, {"type": "string"}, f"Only this {name}.") for name in GROUP_NAMES if name != "day"),
    ],
    **{action: [_UPSTREAM] for action in ("chat.completions.create", "completions.create", "embeddings.create")},
}
"""By action: parameters beside those of the path."""


def body_schemas() -> dict[str, Any]:
    """Return the components that `BODIES` refers to."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    # `extra` is where unknown top-level fields are kept, not a field of the wire.
    schemas["ChatRequest"]["properties"].pop("extra")
    schemas["ChatRequest"]["additionalProperties"] = True
    options = schemas.pop("KeyOptions")
    key_id = {"type": "string", "pattern": f"^{KEY_ID.pattern}$"}
    schemas["NewKey"] = options | {
        "title": "NewKey",
        "properties": {"id": key_id, "expires_at": _EXPIRY, **options["properties"]},
        "required": ["id"],
    }
    return schemas
