"""From what an MCP server answers to a `ToolResult`."""

from __future__ import annotations

import json
from typing import Any

import mcp_types as types

from gateway.tools.port import ToolPart, ToolResult


def result_of(answer: types.CallToolResult) -> ToolResult:
    """Return the result: texts joined, the rest as parts; structured content alone becomes text, too."""
    texts: list[str] = []
    parts: list[ToolPart] = []
    for block in answer.content:
        if isinstance(block, types.TextContent):
            texts.append(block.text)
        elif isinstance(block, types.ImageContent):
            parts.append(ToolPart(kind="image", media_type=block.mime_type, data=block.data))
        elif isinstance(block, types.AudioContent):
            parts.append(ToolPart(kind="audio", media_type=block.mime_type, data=block.data))
        elif isinstance(block, types.ResourceLink):
            parts.append(ToolPart(kind="resource", media_type=block.mime_type or "", uri=str(block.uri)))
        elif isinstance(block.resource, types.TextResourceContents):
            texts.append(block.resource.text)
        else:
            media_type = block.resource.mime_type or "application/octet-stream"
            parts.append(ToolPart(kind="resource", media_type=media_type, data=block.resource.blob))
    structured: Any = answer.structured_content
    if not texts and structured is not None:
        texts.append(json.dumps(structured, ensure_ascii=False))
    return ToolResult(text="\n".join(texts), structured=structured, parts=tuple(parts), is_error=bool(answer.is_error))
