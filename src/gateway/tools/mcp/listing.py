"""A server's tool list, read with suspicion: what may be offered of it, under which hash, and what is refused why."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import mcp_types as types
from msgspec import Struct

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LONGEST_DESCRIPTION = 16_384
_LARGEST_SCHEMA = 65_536
_DEEPEST_SCHEMA = 32
_REFUSED = "agent-gateway/refused"


class ListedTool(Struct, frozen=True):
    """A tool as its server describes it now. ``definition`` is what ``digest`` is the SHA-256 of."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    digest: str
    definition: str
    title: str | None = None
    output_schema: Mapping[str, Any] | None = None


class RefusedTool(Struct, frozen=True):
    """A tool that is not offered whatever anybody approves, and why; ``name`` is safe to show."""

    name: str
    why: str


def read_listing(tools: Sequence[types.Tool]) -> tuple[list[ListedTool], list[RefusedTool]]:
    """Return what may be offered and what may not; of tools that share a name, none may."""
    times = Counter(tool.name for tool in tools)
    listed: list[ListedTool] = []
    refused: dict[str, RefusedTool] = {}
    for tool in tools:
        why = "its server lists several tools of this name" if times[tool.name] > 1 else _fault(tool)
        if why is None:
            listed.append(_listed(tool))
        else:
            refused.setdefault(tool.name, RefusedTool(clean(tool.name)[:64], why))
    return listed, list(refused.values())


def stand_in(tool: object, number: int, why: str) -> dict[str, Any]:
    """Return what stands for the ``number``-th definition of a list: `mcp` takes it, `read_listing` refuses it."""
    name = tool.get("name") if isinstance(tool, dict) else None
    shown = name if isinstance(name, str) and name else f"(number {number} of the list)"
    return {"name": shown[:256], "inputSchema": {"type": "object"}, "_meta": {_REFUSED: why}}


def clean(text: str) -> str:
    """Return the text without control and format characters, which hide words from people and not from models."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cn"))


def _fault(tool: types.Tool) -> str | None:
    malformed = (tool.meta or {}).get(_REFUSED)
    if malformed is not None:
        return clean(str(malformed))[:300]
    if NAME.fullmatch(tool.name) is None:
        return "its name has characters other than A-Z a-z 0-9 _ -, or more than 64 of them"
    if len(tool.description or "") > _LONGEST_DESCRIPTION:
        return f"its description has more than {_LONGEST_DESCRIPTION:,} characters"
    for schema in (tool.input_schema, tool.output_schema):
        if schema is None:
            continue
        if _depth(schema) > _DEEPEST_SCHEMA:
            return f"its schema is nested more than {_DEEPEST_SCHEMA} levels deep"
        if len(json.dumps(schema)) > _LARGEST_SCHEMA:
            return f"its schema is larger than {_LARGEST_SCHEMA:,} characters"
    if tool.input_schema.get("type") != "object":
        return "its schema is not that of an object"
    return None


def _listed(tool: types.Tool) -> ListedTool:
    known = {"name", "title", "description", "inputSchema", "outputSchema", "annotations"}
    whole = tool.model_dump(mode="json", by_alias=True, exclude_none=True)
    definition = json.dumps({key: whole[key] for key in sorted(known & whole.keys())}, sort_keys=True)
    return ListedTool(
        name=tool.name,
        description=clean(tool.description or ""),
        parameters=tool.input_schema,
        digest=hashlib.sha256(definition.encode()).hexdigest(),
        definition=definition,
        title=clean(tool.title)[:256] if tool.title else None,
        output_schema=tool.output_schema,
    )


def _depth(value: Any, level: int = 1) -> int:
    if level > _DEEPEST_SCHEMA:
        return level
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((_depth(item, level + 1) for item in items), default=level)
