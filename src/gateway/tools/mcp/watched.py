"""A transport under watch: it tells when the server's side has ended, and lets no bad tool spoil a whole list.

`mcp` refuses a list of tools as one, so that a single wrong definition would take a server's other tools with it. Here
such a definition is replaced, before `mcp` reads the list, by a stand-in that `read_listing` refuses with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any

import mcp_types as types
from mcp.shared.inbound import find_invalid_x_mcp_header
from mcp.shared.message import SessionMessage
from mcp_types.methods import validate_server_result
from mcp_types.version import LATEST_HANDSHAKE_VERSION, MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from gateway.tools.mcp.listing import stand_in
from gateway.tools.mcp.wire import Streams


class Watched:
    """One connection of a transport. ``revision`` is that of the protocol, once the two sides agreed on one."""

    def __init__(self, inner: Any, ended: Callable[[], None], *, max_tools: int) -> None:
        self.revision: str | None = None
        self._inner = inner
        self._ended = ended
        self._most = max_tools

    async def __aenter__(self) -> Streams:
        reading, writing = await self._inner.__aenter__()
        return _Reader(reading, self._ended, self._sieved), writing

    async def __aexit__(self, *error: Any) -> Any:
        return await self._inner.__aexit__(*error)

    def _sieved(self, item: Any) -> Any:
        message = item.message if isinstance(item, SessionMessage) else None
        if isinstance(message, types.JSONRPCResponse) and isinstance(message.result.get("tools"), list):
            message.result = sound(message.result, self.revision or LATEST_HANDSHAKE_VERSION, self._most)
        return item


def sound(result: dict[str, Any], revision: str, most: int) -> dict[str, Any]:
    """Return a page of tools that `mcp` takes, at most one more than ``most``; others have a stand-in.

    A page that is wrong in another way is left to `mcp`, which refuses it.
    """
    result = {**result, "tools": result["tools"][: most + 1]}
    if _fault({**result, "tools": []}, revision) is not None:
        return result
    whole = _fault(result, revision) is None
    tools = []
    for number, tool in enumerate(result["tools"], 1):
        why = None if whole else _fault({**result, "tools": [tool]}, revision)
        if why is None and revision in MODERN_PROTOCOL_VERSIONS and find_invalid_x_mcp_header(tool["inputSchema"]):
            why = "its schema has an x-mcp-header where the protocol has none"
        tools.append(tool if why is None else stand_in(tool, number, why))
    return {**result, "tools": tools}


def _fault(result: dict[str, Any], revision: str) -> str | None:
    """Say what `mcp` finds wrong with a page, in the words of its first tool; never what stands there."""
    try:
        validate_server_result("tools/list", revision, result)
        types.ListToolsResult.model_validate(result, by_name=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][2:])
        return f"its definition is not one of the protocol's ({where[:100] or 'all of it'}: {first['type']})"
    except (RecursionError, ValueError, KeyError) as error:
        return f"its definition cannot be read ({type(error).__name__})"
    return None


class _Reader:
    def __init__(self, inner: Any, ended: Callable[[], None], take: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._ended = ended
        self._take = take

    @property
    def last_context(self) -> Context | None:
        """The sender's context, which `mcp` looks for."""
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> Any:
        try:
            return self._take(await self._inner.receive())
        except Exception:
            self._ended()
            raise

    def __aiter__(self) -> _Reader:
        return self

    async def __anext__(self) -> Any:
        try:
            return self._take(await self._inner.__anext__())
        except (StopAsyncIteration, Exception):
            self._ended()
            raise

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def __aenter__(self) -> _Reader:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._inner.__aexit__(*error)
