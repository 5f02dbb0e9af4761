"""The pool with a server of somebody else's: `@modelcontextprotocol/server-everything`, on Node.js.

Install it with ``npm install --global @modelcontextprotocol/server-everything``, or name its program in
GATEWAY_TEST_MCP_EVERYTHING.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest

from gateway.principal import Principal
from gateway.tools.config import McpTools
from gateway.tools.mcp.pins import MemoryPins
from gateway.tools.mcp.provider import McpProvider
from gateway.tools.port import ToolContext, ToolResult
from tests.support.mcp_servers import until
from tests.support.server import free_port

PROGRAM = os.environ.get("GATEWAY_TEST_MCP_EVERYTHING") or shutil.which("mcp-server-everything")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(PROGRAM is None, reason="mcp-server-everything is not installed (see the docstring)"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def provider(**entry: Any) -> AsyncIterator[McpProvider]:
    config = msgspec.convert({"name": "every", "provider": "mcp", "stream": True, **entry}, McpTools)
    made = McpProvider(config, max_result_bytes=256 * 1024, pins=MemoryPins(), on_change=lambda: None)
    await made.open()
    try:
        await until(made.list_tools, "the tools are listed")
        yield made
    finally:
        await made.aclose()


@asynccontextmanager
async def running(port: int, transport: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    assert PROGRAM is not None
    process = await asyncio.to_thread(
        subprocess.Popen,
        ["node", PROGRAM, transport],
        env={**os.environ, "PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await until(lambda: listens(port), "the server listens")
        yield process
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("localhost", port), 1):
        return True
    return False


async def call(made: McpProvider, tool: str, arguments: Any, progress: Any = None) -> ToolResult:
    spec = next(spec for spec in made.list_tools() if spec.remote_name == tool)
    context = ToolContext(
        principal=Principal(id="k", key_id="k", allow=("*",)),
        request_id="r",
        source="api",
        deadline=asyncio.get_running_loop().time() + 20,
        max_result_bytes=256 * 1024,
        call_id="c",
        progress=progress,
    )
    return await made.call(spec, arguments, context)


async def use(made: McpProvider) -> None:
    told: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append(done)

    assert (await call(made, "echo", {"message": "hello"})).text == "Echo: hello"
    image = await call(made, "get-tiny-image", {})
    assert [part.media_type for part in image.parts] == ["image/png"]
    await call(made, "trigger-long-running-operation", {"duration": 0.2, "steps": 2}, progress)
    assert told


async def test_over_stdio_killed_and_restarted() -> None:
    assert PROGRAM is not None
    async with provider(command=["node", PROGRAM, "stdio"]) as made:
        await use(made)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        await until(lambda: made.health().status != "ok", "its end is seen")
        await use(made)
        assert children()
    assert not children()


@pytest.mark.parametrize(("kind", "path", "transport"), [("streamableHttp", "mcp", "http"), ("sse", "sse", "sse")])
async def test_over_http_killed_and_restarted(kind: str, path: str, transport: str) -> None:
    port = free_port()
    entry = {
        "url": f"http://localhost:{port}/{path}",
        "transport": transport,
        "network": {"allow_private": ["localhost"]},
    }
    async with running(port, kind), provider(**entry) as made:
        await use(made)
    async with running(port, kind) as server, provider(**entry) as made:
        await use(made)
        server.kill()
        server.wait()
        async with running(port, kind):
            await until(lambda: made.health().status == "ok", "connected again")
            await use(made)


def children() -> list[int]:
    """The processes of this server that this test started."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if PROGRAM and PROGRAM in line]
