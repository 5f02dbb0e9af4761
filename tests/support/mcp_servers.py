"""MCP servers for tests: plain ones over stdio, ones of the `mcp` package over HTTP, and hostile ones over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

RAW_SERVER = Path(__file__).parents[1] / "fixtures" / "mcp" / "raw_server.py"
HTTP_SERVER = Path(__file__).parents[1] / "fixtures" / "mcp" / "http_server.py"


def raw_command(pids: Path) -> tuple[str, ...]:
    """Return the command of `raw_server.py`, which writes its process ids to ``pids``."""
    return (sys.executable, "-S", "-E", str(RAW_SERVER), str(pids))


def read_pids(path: Path) -> list[int]:
    """Return the process ids written so far."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def environment(pid: int) -> bytes:
    """Return the environment a process was started with."""
    return Path(f"/proc/{pid}/environ").read_bytes()


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    """Wait until ``condition()`` is true, bounded."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.005)


async def quickest(work: Callable[[], Awaitable[Any]], tries: int = 3) -> tuple[float, Any]:
    """Return the seconds of the quickest of some tries, and its result: the machine may be busy in one of them."""
    best: tuple[float, Any] = (float("inf"), None)
    for _ in range(tries):
        started = time.perf_counter()
        result = await work()
        best = min(best, (time.perf_counter() - started, result), key=lambda item: item[0])
    return best


@contextmanager
def http_server(port: int, transport: str = "streamable-http", **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server of the `mcp` package on a port; yield once it listens."""
    process = subprocess.Popen(
        [sys.executable, str(HTTP_SERVER), str(port), transport], env={**os.environ, **env}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, "the MCP server did not start"
                time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def respond(writer: asyncio.StreamWriter, status: int, body: bytes = b"", *headers: str) -> None:
    """Write one whole HTTP response."""
    lines = [f"HTTP/1.1 {status} x", f"content-length: {len(body)}", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)


def reply(writer: asyncio.StreamWriter, request: dict[str, Any], result: Any) -> None:
    """Answer one JSON-RPC request."""
    body = json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode()
    respond(writer, 200, body, "content-type: application/json")


_ECHO = {"name": "echo", "inputSchema": {"type": "object"}}


@asynccontextmanager
async def hostile_http(on_call: Answer, *, revision: str | None = None, tools: Sequence[Any] = (_ECHO,)) -> Any:
    """Serve MCP in this process: a proper handshake and one tool, ``echo``; ``on_call`` answers its calls.

    With ``revision`` it speaks that one, which has no handshake. Yields the URL and the headers of all requests.
    """
    also = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"} if revision else {}
    seen: list[dict[str, str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
                seen.append(headers)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if not lines[0].startswith("POST"):
                    respond(writer, 405)
                    continue
                request = json.loads(body)
                method = request["method"]
                if "id" not in request:
                    respond(writer, 202)
                elif method == "initialize":
                    version = request["params"]["protocolVersion"]
                    info = {"name": "hostile", "version": "1"}
                    result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
                    reply(writer, request, result)
                elif method == "server/discover" and revision:
                    offers = {"supportedVersions": [revision], "capabilities": {"tools": {}}}
                    reply(writer, request, {**also, **offers, "serverInfo": {"name": "hostile", "version": "1"}})
                elif method == "tools/list":
                    reply(writer, request, {**also, "tools": tools})
                elif method == "tools/call":
                    await on_call(request, writer)
                else:
                    respond(writer, 404)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/mcp", seen
    finally:
        server.close()
