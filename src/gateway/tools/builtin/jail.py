"""Jail: one command in namespaces of its own, made by bubblewrap; where there can be no jail, nothing runs.

What is in there: the system's programs read-only, a workspace, a bounded `/tmp`, and nothing else of the machine: no
network, no environment, no capability, no other process. The kernel ends everything in it with its first process, and
that one ends with the gateway.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from msgspec import Struct

from gateway.tools.config import JailLimits

if sys.platform != "win32":
    import fcntl

WORKSPACE = "/workspace"
"""Where the workspace is, seen from inside."""

NOBODY = 65_534
"""Who runs in a jail that root made: the kernel counts no processes of root's."""

_USER = "1000"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_OF_ETC = ("/etc/alternatives", "/etc/ld.so.cache")
_ENVIRONMENT = {
    "HOME": WORKSPACE,
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TMPDIR": "/tmp",
}
_INSTALL = {"bwrap": "bubblewrap", "choom": "util-linux", "prlimit": "util-linux", "setpriv": "util-linux"}
_INSTALL |= {"nice": "coreutils", "timeout": "coreutils"}
_READ = 65_536
_DISCARDED = 16 * 1024 * 1024
_LOOK_S = 0.25
_END_S = 5.0
_PROBE_S = 10.0
_NICE = "10"


class JailUnavailable(Exception):
    """There is no jail here; the text says why and what to do, `details` what bubblewrap said of it."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Job(Struct, frozen=True, kw_only=True):
    """What to run: ``seconds`` at most, ``file_bytes`` for the largest file, ``output_bytes`` kept of each stream.

    Without a ``workspace`` there is an empty one. ``over`` is asked several times a second, and says why the job is to
    be stopped, if it is.
    """

    command: tuple[str, ...]
    workspace: Path | None
    seconds: float
    file_bytes: int
    output_bytes: int
    stdin: bytes = b""
    over: Callable[[], Awaitable[str | None]] | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    """How it went. ``exit_code`` is None for a job that was ``stopped``, which says why; ``cut``: output is missing."""

    exit_code: int | None
    stdout: bytes
    stderr: bytes
    cut: bool
    timed_out: bool
    stopped: str | None


@dataclass(slots=True)
class _Sink:
    """The beginning of a stream; the rest is counted."""

    limit: int
    kept: bytearray = field(default_factory=bytearray)
    dropped: int = 0

    def take(self, chunk: bytes) -> None:
        room = self.limit - len(self.kept)
        self.kept += chunk[:room]
        self.dropped += max(0, len(chunk) - room)


class Jail:
    """The way of this machine to make jails. ``hidden`` are folders that are to be empty inside, wherever they are.

    ``shown`` are folders that are there read-only besides the system's.
    """

    def __init__(self, limits: JailLimits, *, hidden: Sequence[Path] = (), shown: Sequence[Path] = ()) -> None:
        self._limits = limits
        self._shown = [str(path) for path in shown]
        self._hidden = [str(path) for path in hidden]
        self._is_root = hasattr(os, "geteuid") and os.geteuid() == 0

    async def probe(self) -> None:
        """Make a jail around nothing; `JailUnavailable` where that fails."""
        if not sys.platform.startswith("linux"):
            raise JailUnavailable("Jails need Linux; run the gateway there, or take this entry out of tools.yaml.")
        for name, package in _INSTALL.items():
            if shutil.which(name) is None and (name != "setpriv" or self._is_root):
                raise JailUnavailable(
                    f"'{name}' is not installed. Install the package '{package}', then call POST /tools/refresh."
                )
        job = Job(command=("true",), workspace=None, seconds=_PROBE_S, file_bytes=0, output_bytes=_READ)
        outcome = await self.run(job)
        if outcome.exit_code != 0:
            raise JailUnavailable(
                "A jail can be made, and nothing runs in it: see tool.jail.refused in the gateway's log.",
                outcome.stderr.decode(errors="replace"),
            )

    async def run(self, job: Job) -> Outcome:
        """Run a job to its end; when this returns or raises, no process of it is left.

        Raises `JailUnavailable` where the jail itself could not be made.
        """
        with closing(_Started.make(self._line, job)) as started:
            stopped, timed_out, sinks = await _attended(started, job)
            exit_code = started.exit_code()
        out, err = sinks
        if exit_code is None and stopped is None:
            raise JailUnavailable(
                "The machine makes no jail for the gateway; most often user namespaces are not allowed to it. See 'The "
                "jail' in docs/systems/tools.md, and tool.jail.refused in the log.",
                bytes(err.kept).decode(errors="replace"),
            )
        return Outcome(
            exit_code=exit_code if stopped is None else None,
            stdout=bytes(out.kept),
            stderr=bytes(err.kept),
            cut=bool(out.dropped or err.dropped),
            timed_out=timed_out,
            stopped=stopped,
        )

    def _line(self, job: Job, info: int, status: int) -> list[str]:
        """Return the command line: bubblewrap, then what sets limits from inside, then the command.

        Which process is the jail's first is told to the descriptor ``info``, how the command ended to ``status``.
        """
        alone = ["--unshare-user", "--disable-userns", "--uid", _USER, "--gid", _USER]
        report = ["--json-status-fd", str(status)]
        outer = [
            *(shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--clearenv"),
            *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
            *("--info-fd", str(info), "--hostname", "jail", *self._filesystem(job)),
        ]
        for name, value in _ENVIRONMENT.items():
            outer += ["--setenv", name, value]
        if not self._is_root:
            return [*outer, *alone, *report, "--cap-drop", "ALL", "--", *self._limited(job)]
        # Root's own processes are not counted (RLIMIT_NPROC), so that nobody runs there; only root can open the
        # workspace, though. Hence two steps: root lays the folders out, nobody gets the namespace of users.
        for name in ("SETUID", "SETGID", "SETPCAP"):
            outer += ["--cap-add", f"CAP_{name}"]
        nobody = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        inner = ["bwrap", *alone, *report, "--dev-bind", "/", "/", "--chdir", WORKSPACE]
        return [*outer, "--", "setpriv", *nobody, "--", *inner, "--", *self._limited(job)]

    def _filesystem(self, job: Job) -> Iterator[str]:
        bound = ["/usr", *self._shown]
        for path in _SYSTEM:
            if os.path.islink(path):
                yield from ("--symlink", os.readlink(path), path)
            elif os.path.isdir(path):
                bound.append(path)
                yield from ("--ro-bind", path, path)
        for path in _OF_ETC:
            yield from (*_above(path), "--ro-bind-try", path, path)
        for path in self._shown:
            yield from (*_above(path), "--ro-bind", path, path)
        for path in self._hidden:
            if any(Path(path).is_relative_to(other) for other in bound):
                yield from ("--size", "4096", "--tmpfs", path, "--remount-ro", path)
        size = str(self._limits.tmp_bytes)
        yield from ("--proc", "/proc", "--dev", "/dev")
        yield from ("--size", size, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev")
        yield from ("--size", size, "--perms", "1777", "--tmpfs", "/tmp")
        if job.workspace is None:
            yield from ("--size", "4096", "--tmpfs", WORKSPACE)
        else:
            yield from ("--bind", str(job.workspace), WORKSPACE)
        yield from ("--chdir", WORKSPACE, "--remount-ro", "/")

    def _limited(self, job: Job) -> list[str]:
        limits = self._limits
        return [
            *("choom", "-n", "1000", "--"),  # whoever runs out of memory, this is what the kernel ends first
            *("nice", "-n", _NICE),
            *("prlimit", "--core=0", f"--cpu={limits.cpu_seconds}", f"--as={limits.memory_bytes}"),
            *(f"--nproc={limits.processes}", f"--nofile={limits.open_files}", f"--fsize={job.file_bytes}", "--"),
            # Should the gateway die before bubblewrap has asked to be told of it, this still is the end.
            *("timeout", "-s", "KILL", f"{job.seconds + _END_S:.0f}"),
            *job.command,
        ]


def _above(path: str) -> Iterator[str]:
    """Make the folders above a path as they usually are; bubblewrap would make them its own alone."""
    for folder in reversed(Path(path).parents[:-1]):
        yield from ("--dir", str(folder))


class _Started:
    """A jail that runs, and our ends of its pipes.

    Not by the event loop's own subprocesses: uvloop's inherit descriptors of the gateway, a worker's listening socket
    included.
    """

    def __init__(self, process: subprocess.Popen[bytes], info: int, status: int) -> None:
        self.process = process
        self._info, self._status = info, status

    @classmethod
    def make(cls, line: Callable[[Job, int, int], list[str]], job: Job) -> _Started:
        (info, their_info), (status, their_status) = os.pipe(), os.pipe()
        given = _sealed(job.stdin)
        try:
            os.set_blocking(status, False)
            process = subprocess.Popen(
                line(job, their_info, their_status),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={},  # the first process in the jail can be asked for what it was given
                cwd="/",
                pass_fds=(their_info, their_status),
            )
        except OSError as error:
            os.close(info)
            os.close(status)
            raise JailUnavailable(f"The jail cannot be started: {error.strerror}.") from error
        finally:
            os.close(their_info)
            os.close(their_status)
            os.close(given)
        return cls(process, info, status)

    async def first_process(self) -> int | None:
        """Return a descriptor of the jail's first process, whose end is that of all; None where it has none."""
        info = os.fdopen(self._info, "rb", buffering=0)
        self._info = -1
        told = _Sink(_READ)
        await _read(info, told)
        try:
            return os.pidfd_open(json.loads(told.kept)["child-pid"])
        except (ValueError, ProcessLookupError):
            return None

    def exit_code(self) -> int | None:
        """Return how the command ended, as bubblewrap reports it; None where it never began."""
        try:
            text = os.read(self._status, 4_096)
        except BlockingIOError:
            return None
        for line in text.splitlines():
            with suppress(ValueError):
                code = json.loads(line).get("exit-code")
                if isinstance(code, int):
                    return code
        return None

    def close(self) -> None:
        """Let go of it; what still runs is ended."""
        if self.process.poll() is None:
            self.process.kill()
        for descriptor in (self._info, self._status):
            if descriptor >= 0:
                os.close(descriptor)


def _sealed(data: bytes) -> int:
    """Return a descriptor to read these bytes from, which nobody can change or make larger."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(
        descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    return descriptor


async def _attended(started: _Started, job: Job) -> tuple[str | None, bool, tuple[_Sink, _Sink]]:
    """Read what a jail says until it ends or is to be stopped; return why it was, and what it said."""
    process = started.process
    assert process.stdout is not None and process.stderr is not None
    sinks = (_Sink(job.output_bytes), _Sink(job.output_bytes))
    # Bubblewrap holds the other ends as long as anything runs in the jail, whatever the command does with its own.
    ended = asyncio.gather(_read(process.stdout, sinks[0]), _read(process.stderr, sinks[1]))
    first = asyncio.ensure_future(started.first_process())
    stopped, timed_out, pause = None, False, _LOOK_S
    try:
        async with asyncio.timeout(job.seconds):
            while stopped is None:
                await asyncio.wait((ended,), timeout=pause)
                if ended.done():
                    break
                if sum(sink.dropped for sink in sinks) > _DISCARDED:
                    stopped = f"Stopped: it wrote more than {_DISCARDED:,} bytes that nobody reads."
                elif job.over is not None:
                    began = time.monotonic()
                    stopped = await job.over()
                    pause = max(_LOOK_S, 10 * (time.monotonic() - began))  # looking takes a tenth of the time at most
    except TimeoutError:
        stopped, timed_out = f"Stopped after {job.seconds:.1f} s.", True
    finally:
        ending = asyncio.ensure_future(_end(process, ended, first))
        try:
            # Whoever cancels must not leave a process behind; every wait inside is bounded.
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise
    return stopped, timed_out, sinks


async def _end(process: subprocess.Popen[bytes], ended: asyncio.Future[Any], first: asyncio.Future[int | None]) -> None:
    """Kill what is left, and see it gone: with the first process of its namespace the kernel ends all others.

    Killing bubblewrap itself is not enough while it starts: its child asks a moment later to be told of its end.
    """
    await asyncio.wait((first,), timeout=_END_S)
    first.cancel()
    descriptor = None
    with suppress(asyncio.CancelledError, OSError):
        descriptor = await first
    if not ended.done():
        with suppress(ProcessLookupError):
            if descriptor is None:
                process.kill()
            else:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    await asyncio.wait((ended,), timeout=_END_S)
    ended.cancel()
    with suppress(asyncio.CancelledError, OSError):
        await ended
    if descriptor is not None:
        await _readable(descriptor)
    with suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(process.wait, _END_S)


async def _readable(descriptor: int) -> None:
    """Wait until a process has ended, its namespace with it; close its descriptor."""
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, gone.set)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _read(pipe: IO[bytes], sink: _Sink) -> None:
    stream = asyncio.StreamReader(limit=_READ)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), pipe
    )
    try:
        while chunk := await stream.read(_READ):
            sink.take(chunk)
    finally:
        transport.close()
