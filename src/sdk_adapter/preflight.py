"""Pre-flight: the first import of changed code happens in a throw-away child, never in the serving process.

This is the serving side. It needs neither the SDK nor any of its time: the server process loads the SDK beside it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from gateway.observability.logs import log_event
from gateway.registry.entry import Diagnostic
from gateway.registry.loading import DropIn
from gateway.registry.policy import ModulePolicy

_LOG = logging.getLogger(__name__)
_SERVER = "sdk_adapter.preflight_process"
_IDLE_S = 60.0
_FAST_S = 1.0
_MAX_SLOW = 32
_START_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """One check. ``env`` and ``sys_path`` are the serving process's, so that the child sees the same world."""

    id: int
    dropin: DropIn | None = None
    names: tuple[str, ...] = ()
    policy: ModulePolicy = field(default_factory=ModulePolicy)
    timeout_s: float = 10.0
    env: dict[str, str] = field(default_factory=dict)
    sys_path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. ``files`` maps each file that was read to its SHA-256; ``output`` is the end of what the
    import printed. Without an error among ``diagnostics`` the drop-in may be imported into the server.
    """

    id: int
    diagnostics: tuple[Diagnostic, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    output: str = ""

    @property
    def failed(self) -> bool:
        """Whether the drop-in must not be imported."""
        return any(item.severity == "error" for item in self.diagnostics)

    @property
    def hashes(self) -> dict[Path, str]:
        """``files`` by `Path`."""
        return {Path(name): digest for name, digest in self.files.items()}


def encode(message: CheckRequest | CheckReport) -> bytes:
    """Return one line of JSON."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"


def decode_request(line: bytes) -> CheckRequest:
    """Read what `encode` wrote."""
    return msgspec.json.decode(line, type=CheckRequest, dec_hook=_to_path)


def decode_report(line: bytes) -> CheckReport:
    """Read what `encode` wrote."""
    return msgspec.json.decode(line, type=CheckReport)


class PreflightUnavailable(Exception):
    """The pre-flight's process cannot be started or died twice over one check."""


class Preflight:
    """Checks drop-ins in children of a fork server, several at a time.

    ``async with`` stops the server at the end. `start` begins to load it; it stops after a minute without work and
    comes back on demand. A check that takes longer than a second leaves its place to the next one, so that a hanging
    import delays nobody.
    """

    def __init__(self, *, places: int | None = None, idle_s: float = _IDLE_S, fork: bool | None = None) -> None:
        self._fork = hasattr(os, "fork") and hasattr(socket, "AF_UNIX") if fork is None else fork
        self._idle_s = idle_s
        self._places = asyncio.Semaphore(places or max(2, os.cpu_count() or 1))
        self._slow = asyncio.Semaphore(_MAX_SLOW)
        self._server: _Server | None = None
        self._starting = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._active = 0
        self._last_id = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def server_pid(self) -> int | None:
        """The process id of the running server, if there is one."""
        return self._server.pid if self._server is not None and self._server.is_alive else None

    async def start(self) -> None:
        """Start the server process, without waiting until it is ready."""
        if self._fork:
            await self._running()
            self._rest()

    async def aclose(self) -> None:
        """Stop the server and everything it started."""
        if self._idle is not None:
            self._idle.cancel()
        server, self._server = self._server, None
        if server is not None:
            await server.aclose()

    async def check(
        self, dropin: DropIn, *, names: tuple[str, ...], policy: ModulePolicy, timeout_s: float
    ) -> CheckReport:
        """Import ``dropin`` in a child and report; cancelling kills the child. Raises `PreflightUnavailable`."""
        self._last_id += 1
        request = CheckRequest(
            self._last_id, dropin, names, policy, timeout_s, dict(os.environ), tuple(map(os.path.abspath, sys.path))
        )
        self._active += 1
        await self._places.acquire()
        work = asyncio.create_task(self._run(request))
        held = self._places
        try:
            done, _ = await asyncio.wait({work}, timeout=_FAST_S)
            if not done:
                await self._slow.acquire()
                held.release()
                held = self._slow
            return await work
        finally:
            held.release()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            self._active -= 1
            self._rest()

    async def _run(self, request: CheckRequest) -> CheckReport:
        if not self._fork:
            return await _check_in_spawned_child(request)
        for _ in range(2):
            server = await self._running()
            report = await server.check(request)
            if report is not None:
                return report
        raise PreflightUnavailable("The process that tries imports out ended unexpectedly, twice.")

    async def _running(self) -> _Server:
        async with self._starting:  # checks that begin together share one server
            if self._server is None or not self._server.is_alive:
                self._server = await _Server.start()
                log_event(_LOG, "agent.preflight.started", level=logging.DEBUG, pid=self._server.pid)
            return self._server

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._active == 0 and self._server is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._stop_idle)

    def _stop_idle(self) -> None:
        if self._active == 0 and self._server is not None:
            server, self._server = self._server, None
            server.stop()
            log_event(_LOG, "agent.preflight.stopped", level=logging.DEBUG, pid=server.pid)


class _Server:
    """The running process and the checks that wait for it."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process = process
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[CheckReport | None]] = {}
        self._closed = self._serves = False
        self._task = asyncio.create_task(self._read(reader), name="pre-flight reader")

    @classmethod
    async def start(cls) -> _Server:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(  # noqa: ASYNC220 - returns at once; asyncio's own needs a watcher thread
                    [sys.executable, "-m", _SERVER, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=_server_environment(),
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise PreflightUnavailable(f"The process that tries imports out cannot start: {error}.") from error
        reader, writer = await asyncio.open_connection(sock=ours, limit=64 * 1024 * 1024)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._closed

    async def check(self, request: CheckRequest) -> CheckReport | None:
        """Return the report, or None if the server died first."""
        future: asyncio.Future[CheckReport | None] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            if self._closed:
                return None
            self._writer.write(encode(request))
            return await future
        except asyncio.CancelledError:
            self._writer.write(encode(CheckRequest(request.id)))
            raise
        finally:
            self._waiting.pop(request.id, None)

    def stop(self) -> None:
        """Close the connection: the server sees it, kills its children and ends."""
        self._closed = True
        self._writer.close()

    async def aclose(self) -> None:
        """Stop the server and wait for its end; one that is still loading has no children, and is not waited for."""
        self.stop()
        if not self._serves:
            self._process.kill()
        await self._task
        if not await _wait(self._process, 5):
            self._process.kill()
            await _wait(self._process, 5)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, ValueError, msgspec.DecodeError):
            while line := await reader.readline():
                report = decode_report(line)
                self._serves = True  # it says so first, with a report on nothing
                future = self._waiting.get(report.id)
                if future is not None and not future.done():
                    future.set_result(report)
        self.stop()
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)
        await _wait(self._process, 5)


async def _check_in_spawned_child(request: CheckRequest) -> CheckReport:
    """Where there is no fork: a fresh process per check."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        _SERVER,
        "-",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_server_environment(),
    )
    try:
        async with asyncio.timeout(request.timeout_s + _START_GRACE_S):
            out, _ = await process.communicate(encode(request))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    try:
        return decode_report(out)
    except msgspec.DecodeError as error:
        raise PreflightUnavailable("The process that tries imports out gave no answer.") from error


async def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Reap a process that was told to end; False if it has not."""
    try:
        await asyncio.to_thread(process.wait, seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _server_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process, with its import path and without keys of upstreams."""
    result = dict(os.environ if env is None else env)
    result["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))
    return result


def _to_path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else value
