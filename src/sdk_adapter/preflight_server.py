"""The pre-flight's server: one single-threaded process that has the SDK loaded and forks a child for every check.

Started by `sdk_adapter.preflight_process` with one end of a socket pair; speaks one JSON object per line. It ends when
the other end closes, and takes its children with it. With ``-`` instead of a descriptor it makes one check from stdin
to stdout: for systems without fork.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.run import set_default_agent_runner

from gateway.registry.discovery import hash_file
from gateway.registry.entry import Diagnostic
from gateway.registry.loading import DropIn, LoadFailed
from sdk_adapter.building import build, timed_out
from sdk_adapter.diagnosis import diagnose
from sdk_adapter.modules import DropInFinder, SourceChanged
from sdk_adapter.preflight import CheckReport, CheckRequest, decode_request, encode
from sdk_adapter.stopping import StoppingRunner

if sys.platform != "win32":
    import resource

_KEPT_OUTPUT = 4096
_MAX_REPORT = 4 * 1024 * 1024
_GRACE_S = 2.0
_SLOW_S = 1.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_DATA_SUFFIXES = frozenset(
    {".csv", ".j2", ".jinja", ".jinja2", ".json", ".md", ".prompt", ".toml", ".txt", ".yaml", ".yml"}
)


def main(arguments: list[str]) -> None:
    """Serve one gateway until it closes its end, or make one check (``-``)."""
    if arguments == ["-"]:
        _check_once()
        return
    with socket.socket(fileno=int(arguments[0])) as connection:
        connection.set_inheritable(False)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _Server(connection).serve()


async def check(request: CheckRequest) -> CheckReport:
    """Import a drop-in here and report."""
    assert request.dropin is not None
    finder = DropInFinder()
    opened = _Opened(request.dropin)
    sys.addaudithook(opened)
    with finder.installed():
        try:
            built = await build(
                request.dropin,
                request.id,
                finder,
                names=request.names,
                policy=request.policy,
                timeout_s=request.timeout_s,
            )
            diagnostics, files = (*built.warnings, *_threads_left(request.dropin)), built.generation.files
        except LoadFailed as failed:
            diagnostics, files = failed.diagnostics, dict(failed.files)
        except SourceChanged:
            diagnostics, files = (), {}
    return CheckReport(request.id, diagnostics, {str(p): h for p, h in {**opened.hashes(), **files}.items()})


def _threads_left(dropin: DropIn) -> tuple[Diagnostic, ...]:
    """Refuse an import that leaves threads which Python waits for at the end: the gateway could not stop."""
    waiting = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    left = [thread for thread in waiting if not thread.name.startswith("ThreadPoolExecutor-")]
    if not left:
        return ()
    return (
        diagnose(
            dropin,
            "threads_left",
            f"The import left {len(left)} running threads that are not daemons; the gateway could never stop.",
            "Start them with threading.Thread(..., daemon=True).",
            kind="import",
        ),
    )


class _Opened:
    """An audit hook that notes the text files in the drop-in's folder which its import reads."""

    def __init__(self, dropin: DropIn) -> None:
        self._folder = f"{dropin.folder}{os.sep}"
        self._read: set[str] = set()
        self._written: set[str] = set()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(self._folder) and Path(path).suffix.lower() in _DATA_SUFFIXES:
            writes = isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+")
            (self._written if writes else self._read).add(path)

    def hashes(self) -> dict[Path, str]:
        """Return what was read and never written, with its hash."""
        return {Path(path): hash_file(Path(path)) for path in self._read - self._written}


@dataclass(slots=True)
class _Check:
    """One child at work."""

    request: CheckRequest
    pid: int
    result_fd: int
    output_fd: int
    started: float
    deadline: float
    exit_fd: int | None = None
    result: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    is_slow: bool = False
    status: int | None = None


class _Server:
    """The loop of the fork server: requests in, children out, reports back."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._incoming = bytearray()
        self._checks: dict[int, _Check] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Run until the connection closes; then kill what is left."""
        try:
            with suppress(BrokenPipeError):  # the gateway may have ended meanwhile, which the first turn notices
                self._connection.sendall(encode(CheckReport(0)))
            while self._turn():
                pass
        finally:
            for item in list(self._checks.values()):
                self._end(item)

    def _turn(self) -> bool:
        for key, _ in self._selector.select(self._patience()):
            if key.data is None:
                if not self._receive():
                    return False
            elif key.data.request.id in self._checks:
                self._read(key.data, key.fd)
        now = time.monotonic()
        for item in list(self._checks.values()):
            if now >= item.deadline:
                self._finish(item, timed_out(_dropin_of(item), item.request.timeout_s))
            elif item.exit_fd is None and self._reap(item, os.WNOHANG):
                self._child_ended(item)
            elif not item.is_slow and now - item.started > _SLOW_S:
                item.is_slow = True
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, item.pid, 10)
        return True

    def _patience(self) -> float | None:
        if not self._checks:
            return None
        now = time.monotonic()
        if any(item.exit_fd is None for item in self._checks.values()):
            return 0.05
        ends = (item.deadline if item.is_slow else item.started + _SLOW_S for item in self._checks.values())
        return max(0.0, min(ends) - now) + 0.001

    def _receive(self) -> bool:
        data = self._connection.recv(1024 * 1024)
        if not data:
            return False
        self._incoming += data
        while (end := self._incoming.find(b"\n")) >= 0:
            request = decode_request(bytes(self._incoming[:end]))
            del self._incoming[: end + 1]
            if request.dropin is not None:
                self._fork(request)
            elif (running := self._checks.get(request.id)) is not None:
                self._end(running)
        return True

    def _fork(self, request: CheckRequest) -> None:
        result_in, result_out = os.pipe()
        output_in, output_out = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._connection.close()
            self._selector.close()
            os.close(result_in)
            os.close(output_in)
            for other in self._checks.values():
                os.close(other.result_fd)
                os.close(other.output_fd)
            _become_child(request, result_out, output_out, parent)
        os.close(result_out)
        os.close(output_out)
        now = time.monotonic()
        item = _Check(request, pid, result_in, output_in, now, now + request.timeout_s + _GRACE_S)
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):
                item.exit_fd = os.pidfd_open(pid)
        for fd in (result_in, output_in, item.exit_fd):
            if fd is not None:
                self._selector.register(fd, selectors.EVENT_READ, item)
        self._checks[request.id] = item

    def _read(self, item: _Check, fd: int) -> None:
        if fd == item.exit_fd:
            self._reap(item, 0)
            self._child_ended(item)
            return
        data = os.read(fd, 65536)
        if not data:
            self._selector.unregister(fd)
        elif fd == item.output_fd:
            item.output += data
            del item.output[:-_KEPT_OUTPUT]
        else:
            item.result += data
            if item.result.endswith(b"\n"):
                self._finish(item)
            elif len(item.result) > _MAX_REPORT:
                self._finish(item, _ended(item, "wrote into the gateway's own channel"))

    def _child_ended(self, item: _Check) -> None:
        """The child is gone: what it wrote is in the pipes; without a report it ended in the middle of the import."""
        for fd, buffer in ((item.result_fd, item.result), (item.output_fd, item.output)):
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):
                while len(buffer) < _MAX_REPORT and (data := os.read(fd, 65536)):
                    buffer += data
        del item.output[:-_KEPT_OUTPUT]
        if item.result.endswith(b"\n"):
            self._finish(item)
            return
        self._finish(item, _ended(item, _fate(item.status or 0)))

    def _reap(self, item: _Check, options: int) -> bool:
        """Collect the child's exit status; False if it is still running."""
        with suppress(ChildProcessError):
            pid, status = os.waitpid(item.pid, options)
            if pid == 0:
                return False
            item.status = status
        return True

    def _finish(self, item: _Check, problem: Diagnostic | None = None) -> None:
        self._end(item)
        output = item.output.decode(errors="replace")
        if problem is not None:
            line = encode(CheckReport(item.request.id, (problem,), output=output))
        else:
            line = bytes(item.result)
        self._connection.sendall(line)

    def _end(self, item: _Check) -> None:
        """Kill the child with everything it started, and forget it."""
        del self._checks[item.request.id]
        for fd in (item.result_fd, item.output_fd, item.exit_fd):
            if fd is not None:
                with suppress(KeyError):
                    self._selector.unregister(fd)
                os.close(fd)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(item.pid, signal.SIGKILL)
        if item.status is None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(item.pid, signal.SIGKILL)
            self._reap(item, 0)
        self._reap_strays()

    def _reap_strays(self) -> None:
        """Kill processes that a drop-in left behind in sessions of their own: they have become our children."""
        known = {item.pid for item in self._checks.values()}
        for _ in range(20):
            strays = [pid for pid in _children() if pid not in known]
            if not strays:
                return
            for pid in strays:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _become_child(request: CheckRequest, result_fd: int, output_fd: int, parent: int) -> None:
    """Make the check in this forked process, and end it."""
    code = 1
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if sys.platform != "win32":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        _adopt_world(request)
        line = encode(asyncio.run(check(request)))
        sys.stdout.flush()
        sys.stderr.flush()
        while line:
            line = line[os.write(result_fd, line) :]
        code = 0
    finally:
        os._exit(code)


def _check_once() -> None:
    """Make one check in this process, which was spawned for it: for systems without fork."""
    request = decode_request(sys.stdin.buffer.readline())
    channel = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    _adopt_world(request)
    report = asyncio.run(check(request))
    channel.write(encode(report))
    channel.flush()
    os._exit(0)


def _adopt_world(request: CheckRequest) -> None:
    """Take over the serving process's environment and import path; the runner starts nothing while files are read."""
    os.environ.clear()
    os.environ.update(request.env)
    sys.path[:] = request.sys_path
    set_default_agent_runner(StoppingRunner())


def _dropin_of(item: _Check) -> DropIn:
    assert item.request.dropin is not None
    return item.request.dropin


def _ended(item: _Check, how: str) -> Diagnostic:
    output = item.output.decode(errors="replace").strip().splitlines()
    return diagnose(
        _dropin_of(item),
        "import_exit",
        f"The import {how}, which would have ended the gateway.",
        'Put what ends the program under if __name__ == "__main__": and look for crashes in native libraries.',
        kind="import",
        cause=output[-1][:200] if output else None,
    )


def _fate(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"ended the process (exit code {os.waitstatus_to_exitcode(status)})"
    number = os.WTERMSIG(status)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    memory = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"


def _children() -> list[int]:
    """Return the ids of this process's children; empty where the system does not tell."""
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _prctl(option: int, value: int) -> None:
    """Set a Linux process attribute; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
