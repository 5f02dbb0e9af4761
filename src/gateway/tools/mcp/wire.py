"""What the MCP transports share: the stream pair, and errors of our own among the server's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from mcp.shared._stream_protocols import ReadStream, WriteStream
from mcp.shared.message import SessionMessage

Streams = tuple[ReadStream[SessionMessage | Exception], WriteStream[SessionMessage]]
Dial = Callable[[], AbstractAsyncContextManager[Streams]]
"""Makes one connection to a server; called once for each."""

GATEWAY_ERROR: Final = -32_098
"""JSON-RPC code of what a transport of ours says in the server's place; ``data.gateway`` says what."""
