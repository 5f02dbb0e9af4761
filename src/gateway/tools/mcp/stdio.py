"""The stdio transport: one server process in a session of its own, read with a cap, ended with all its children."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import ErrorData, JSONRPCError, jsonrpc_message_adapter

from gateway.observability.logs import log_event
from gateway.tools.mcp.wire import GATEWAY_ERROR, Streams

_log = logging.getLogger("gateway.mcp")

TOKEN = "GATEWAY_MCP_PROCESS"
"""In the environment of every process that descends from a server: how those that left its group are found."""

_READ = 65_536
_LONGEST_SKIPPED = 256 * 1024 * 1024
_MOST_GARBAGE = 1_000
_QUEUED = 64
_ENDS_ITSELF_S = 2.0
_TERMINATES_S = 1.0
_KILLED_S = 2.0
_LAST_WORDS_S = 0.1
_EDGE = 512
_ID_FIRST = re.compile(rb'^\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d{1,15})\s*,')
_ID_LAST = re.compile(rb',\s*"id"\s*:\s*(\d{1,15})\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$')


@dataclass(frozen=True, slots=True)
class StdioTarget:
    """What to run. ``env`` is added to a small safe environment; nothing of the gateway's own is passed on."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None

    @property
    def identity(self) -> str:
        """What makes it this server and no other; no secret in it."""
        return "\0".join(("stdio", *self.command))


@asynccontextmanager
async def stdio_streams(target: StdioTarget, *, message_limit: int) -> AsyncIterator[Streams]:
    """Run the server and yield the streams to it; on leaving, no process that it started is left.

    A line longer than ``message_limit`` bytes fails the call it answers, without being held in memory. Raises
    `OSError` when the command cannot be run.
    """
    token = secrets.token_hex(16)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(
        lambda: _Protocol(_READ, loop),
        *target.command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**get_default_environment(), **target.env, TOKEN: token},
        cwd=target.cwd,
        start_new_session=True,
    )
    process = asyncio.subprocess.Process(transport, protocol, loop)
    to_session, from_server = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_server, from_session = anyio.create_memory_object_stream[SessionMessage](_QUEUED)
    tasks = [
        asyncio.ensure_future(_read(process, to_session, message_limit)),
        asyncio.ensure_future(_write(process, from_session, to_session)),
        asyncio.ensure_future(_discard_errors(process)),
        asyncio.ensure_future(_watch(protocol.exited, to_session)),
    ]
    try:
        yield from_server, to_server
    finally:
        ending = asyncio.ensure_future(_end(process, transport, protocol.exited, token, tasks))
        try:
            # Whoever cancels must not leave a process behind; every wait inside is bounded.
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise
        finally:
            for stream in (to_session, from_server, to_server, from_session):
                stream.close()


class _Protocol(asyncio.subprocess.SubprocessStreamProtocol):
    """Tells when the process itself has ended: ``wait()`` goes on while a child of it holds a pipe open."""

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit, loop)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


async def _watch(exited: asyncio.Event, out: MemoryObjectSendStream[SessionMessage | Exception]) -> None:
    """End the session soon after the process, though a child of it may hold its output open."""
    await exited.wait()
    await asyncio.sleep(_LAST_WORDS_S)
    out.close()


async def _read(
    process: asyncio.subprocess.Process,
    out: MemoryObjectSendStream[SessionMessage | Exception],
    limit: int,
) -> None:
    assert process.stdout is not None
    lines = _Lines(limit)
    garbage = 0
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
        async with out:
            while chunk := await process.stdout.read(_READ):
                for line in lines.feed(chunk):
                    message = _too_long(line) if isinstance(line, _TooLong) else _parsed(line)
                    if message is None and isinstance(line, bytes):
                        garbage += 1
                        message = _unreadable(line)
                    if message is not None:
                        await out.send(message)
                    elif isinstance(line, _TooLong):
                        return
                    if garbage > _MOST_GARBAGE:
                        return
                if lines.skipped > _LONGEST_SKIPPED:
                    return


async def _write(
    process: asyncio.subprocess.Process,
    source: MemoryObjectReceiveStream[SessionMessage],
    out: MemoryObjectSendStream[SessionMessage | Exception],
) -> None:
    assert process.stdin is not None
    try:
        async with source:
            async for item in source:
                data = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(data.encode() + b"\n")
                await process.stdin.drain()
    except (OSError, anyio.ClosedResourceError, anyio.BrokenResourceError):
        out.close()  # the session learns that nobody will answer


async def _discard_errors(process: asyncio.subprocess.Process) -> None:
    """Read what the server says on stderr, so that it never waits; shown in the log at level debug alone."""
    assert process.stderr is not None
    while chunk := await process.stderr.read(_READ):
        if _log.isEnabledFor(logging.DEBUG):
            text = chunk[-2_000:].decode(errors="replace").strip()
            log_event(_log, "mcp.server.stderr", level=logging.DEBUG, pid=process.pid, text=text)


@dataclass(slots=True)
class _TooLong:
    head: bytes
    tail: bytes


class _Lines:
    """Cuts bytes into lines; of a line that is too long only both ends are kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._long: _TooLong | None = None
        self.skipped = 0

    def feed(self, chunk: bytes) -> list[bytes | _TooLong]:
        lines: list[bytes | _TooLong] = []
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(piece)
            lines.append(self._long or bytes(self._buffer))
            self._buffer.clear()
            self._long, self.skipped = None, 0
        self._add(rest)
        return [line for line in lines if isinstance(line, _TooLong) or line.strip()]

    def _add(self, piece: bytes) -> None:
        if self._long is not None:
            self.skipped += len(piece)
            self._long.tail = (self._long.tail + piece)[-_EDGE:]
            return
        self._buffer += piece
        if len(self._buffer) > self._limit:
            self._long = _TooLong(bytes(self._buffer[:_EDGE]), bytes(self._buffer[-_EDGE:]))
            self.skipped = len(self._buffer)
            self._buffer = bytearray()


def _parsed(line: bytes) -> SessionMessage | None:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError:
        return None


def _too_long(line: _TooLong) -> SessionMessage | None:
    """Answer the request whose answer was too long, if the line says which one it was."""
    return _refusal(line.head, line.tail, "too_large")


def _unreadable(line: bytes) -> SessionMessage | None:
    """Answer the request whose answer is not JSON-RPC (or nested too deep to be read), if the line says which one.

    A line that only passes by, such as a log of the server's, says nothing of JSON-RPC.
    """
    return _refusal(line[:_EDGE], line[-_EDGE:], "malformed") if b'"jsonrpc"' in line else None


def _refusal(head: bytes, tail: bytes, reason: str) -> SessionMessage | None:
    found = _ID_FIRST.search(head) or _ID_LAST.search(tail)
    if found is None:
        return None
    error = ErrorData(code=GATEWAY_ERROR, message=reason, data={"gateway": reason})
    return SessionMessage(JSONRPCError(jsonrpc="2.0", id=int(found[1]), error=error))


async def _end(
    process: asyncio.subprocess.Process,
    transport: asyncio.SubprocessTransport,
    exited: asyncio.Event,
    token: str,
    tasks: Sequence[asyncio.Future[None]],
) -> None:
    """Close its input, wait, then end the group and whatever left it."""
    assert process.stdin is not None
    tasks[1].cancel()
    process.stdin.close()
    if not await _happens(exited, _ENDS_ITSELF_S):
        _signal_group(process, signal.SIGTERM)
        await _happens(exited, _TERMINATES_S)
    _signal_group(process, signal.SIGKILL)
    await asyncio.to_thread(_kill_descendants, token)
    if not await _happens(exited, _KILLED_S):
        log_event(_log, "mcp.server.close_failed", level=logging.WARNING, pid=process.pid, error="still running")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    transport.close()


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _signal_group(process: asyncio.subprocess.Process, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _kill_descendants(token: str) -> None:
    """Kill the processes that carry the server's token, those that left its group, too; wait for it. Linux only."""
    deadline = time.monotonic() + _KILLED_S
    while sys.platform == "linux" and time.monotonic() < deadline:
        mark = f"{TOKEN}={token}".encode()
        if sum(_killed(folder, mark) for folder in Path("/proc").iterdir()) == 0:
            return
        time.sleep(0.005)


def _killed(folder: Path, mark: bytes) -> bool:
    with suppress(OSError):
        if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
            os.kill(int(folder.name), signal.SIGKILL)
            return True
    return False
