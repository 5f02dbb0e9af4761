"""The supervisor of `gateway serve --workers N`: starts workers on one socket, replaces the dead, ends them in time.

It serves nothing itself and imports nothing of what they serve with. Workers are started, not forked, so that no
thread, loop or lock of one process is copied into another. It passes messages between them and renders their metrics.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from gateway.config import Settings
from gateway.observability.logs import configure_logging, log_event
from gateway.workers.hub import Hub
from gateway.workers.peer import CallFailed, Peer
from gateway_cli.errors import CliError
from gateway_cli.state import announce

_LOG = logging.getLogger("gateway.supervisor")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SETTLED_S = 10.0
"""A worker that served this long and died is replaced at once; one that dies sooner waits longer each time."""
_SIGNAL_NAMES = {int(known): known.name for known in signal.Signals}  # a real-time signal has none
_PING_EVERY_S = 5.0
_RELOAD_S = 120.0
_LAST_S = 4
"""Seconds after the drain time when workers that are still there are killed."""
_CODE = """import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from gateway_cli.worker import main
sys.exit(main())"""


def supervise(settings: Settings, listener: socket.socket, url: str) -> int:
    """Keep ``settings.workers`` workers serving ``listener`` until a signal; raise `CliError` if they cannot start."""
    configure_logging(
        settings.log_level, exception_text=settings.log_exception_text, as_text=settings.log_format == "text"
    )
    with announce(settings, url):
        return asyncio.run(Supervisor(settings, listener, url).run())


@dataclass(slots=True)
class _Slot:
    """A place for one worker, and the one that has it."""

    number: int
    process: asyncio.subprocess.Process | None = None
    serves: bool = False
    pause_s: float = _FIRST_PAUSE_S
    refusal: str | None = None
    stalled: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def code(self) -> int | None:
        """The exit code of the worker that had it last; None of one that was never started."""
        return None if self.process is None else self.process.returncode


class Supervisor:
    """Owns the worker processes."""

    def __init__(self, settings: Settings, listener: socket.socket, url: str) -> None:
        self._settings = settings
        self._listener = listener
        self._url = url
        self._hub = Hub()
        self._slots = [_Slot(number) for number in range(settings.workers)]
        self._stopping = asyncio.Event()
        self._has_served = False
        self._reloads: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Keep every slot filled until a signal, then end all."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        keeping = [asyncio.create_task(self._keep(slot)) for slot in self._slots]
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([*keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
        self._stopping.set()
        await self._end(keeping)
        for task in keeping:
            task.result()
        refusal = next((slot.refusal for slot in self._slots if slot.refusal), None)
        if refusal is not None and not self._has_served:
            raise CliError(refusal)
        return 0

    async def _keep(self, slot: _Slot) -> None:
        """Fill one slot again and again; return when the gateway stops, or when it cannot start at all."""
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                await self._fill(slot)
            except OSError as error:  # no process, file or memory to be had: the others serve on
                slot.process, slot.refusal = None, f"No worker can be started: {error.strerror or error}."
            if self._stopping.is_set():
                return
            if slot.refusal is not None and not self._has_served:
                return
            if slot.serves and time.monotonic() - started >= _SETTLED_S:
                slot.pause_s = _FIRST_PAUSE_S
                pause_s = 0.0
            else:
                pause_s, slot.pause_s = slot.pause_s, min(slot.pause_s * 2, _LONGEST_PAUSE_S)
            self._hub.metrics.worker_restarted(_reason(slot))
            log_event(
                _LOG,
                "worker.died",
                level=logging.ERROR,
                message=slot.refusal or _how(slot.code),
                slot=slot.number,
                pid=None if slot.process is None else slot.process.pid,
                exit_code=slot.code,
                restart_in_s=pause_s,
                serving=self._hub.serving,
                of=len(self._slots),
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s or 0.001)

    async def _fill(self, slot: _Slot) -> None:
        """Start a worker and wait for its end."""
        slot.serves, slot.refusal, slot.stalled = False, None, False
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as unused:
            unused.enter_context(ours)
            slot.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _CODE,
                json.dumps(sys.path),
                *("--slot", str(slot.number)),
                *("--listener", str(self._listener.fileno())),
                *("--channel", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment(),
                pass_fds=(self._listener.fileno(), theirs.fileno()),
            )
            unused.pop_all()
        peer = Peer(ours)
        await peer.open()
        self._prepare(slot, peer)
        work = [asyncio.create_task(peer.run()), asyncio.create_task(self._watch(slot, peer))]
        if self._stopping.is_set():
            slot.process.terminate()
        try:
            await slot.process.wait()
        finally:
            peer.close()
            for task in work:
                task.cancel()
            await asyncio.wait(work)
            self._hub.detach(slot.number, peer)
            self._count()

    def _prepare(self, slot: _Slot, peer: Peer) -> None:
        async def serves(pid: int) -> None:
            slot.serves = True
            self._hub.attach(slot.number, pid, peer)
            self._count()
            log_event(_LOG, "worker.serving", slot=slot.number, pid=pid)
            if not self._has_served:
                self._has_served = True
                print(f"Agent Gateway answers at {self._url}, {len(self._slots)} workers", file=sys.stderr, flush=True)

        async def refused(message: str) -> None:
            slot.refusal = message
            self._hub.refused(slot.number)

        self._hub.prepare(peer)
        peer.handle("worker.serves", serves)
        peer.handle("worker.refused", refused)

    async def _watch(self, slot: _Slot, peer: Peer) -> None:
        """Kill a worker that stands still: the streams it holds are lost already."""
        limit = self._settings.worker_timeout_s
        while True:
            await asyncio.sleep(min(_PING_EVERY_S, limit))
            if not slot.serves:
                continue
            try:
                await peer.call("worker.ping", timeout_s=limit)
            except CallFailed:
                if slot.process is not None and slot.process.returncode is None and not self._stopping.is_set():
                    log_event(
                        _LOG,
                        "worker.stalled",
                        level=logging.ERROR,
                        slot=slot.number,
                        pid=slot.process.pid,
                        after_s=limit,
                    )
                    slot.stalled = True
                    slot.process.kill()
                return

    def _count(self) -> None:
        self._hub.metrics.workers(serving=self._hub.serving, wanted=len(self._slots))

    def _environment(self) -> dict[str, str]:
        settings = self._settings
        chosen = {
            "GATEWAY_ENV": settings.environment,
            "GATEWAY_HOST": settings.host,
            "GATEWAY_PORT": settings.port,
            "GATEWAY_WORKERS": settings.workers,
            "GATEWAY_TLS_CERT": settings.tls_cert,
            "GATEWAY_TLS_KEY": settings.tls_key,
            "GATEWAY_AGENT_DISCOVERY_PATH": settings.agent_path,
        }
        return os.environ | {name: str(value) for name, value in chosen.items() if value is not None}

    def _stop(self) -> None:
        """End gracefully at the first signal, at once at the second."""
        if self._stopping.is_set():
            self._signal_all(signal.SIGKILL)
        self._stopping.set()

    async def _end(self, keeping: list[asyncio.Task[None]]) -> None:
        log_event(_LOG, "gateway.stopping", drain_s=self._settings.drain_s)
        self._signal_all(signal.SIGTERM)
        _, late = await asyncio.wait(keeping, timeout=math.ceil(self._settings.drain_s) + _LAST_S)
        if late:
            self._signal_all(signal.SIGKILL)
            await asyncio.wait(late)

    def _signal_all(self, number: int) -> None:
        for slot in self._slots:
            if slot.process is not None and slot.process.returncode is None:
                with suppress(ProcessLookupError):
                    slot.process.send_signal(number)

    def _begin_reload(self) -> None:
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        for reply in await self._hub.everywhere("worker.reload", timeout_s=_RELOAD_S):
            if reply.error is not None:
                log_event(
                    _LOG,
                    "worker.reload.failed",
                    level=logging.ERROR,
                    message=reply.error,
                    slot=reply.slot,
                    pid=reply.pid,
                )


def _reason(slot: _Slot) -> str:
    if slot.refusal is not None:
        return "refused"
    if slot.stalled:
        return "stalled"
    return "killed" if (slot.code or 0) < 0 else "exited"


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"The worker was ended by {_SIGNAL_NAMES.get(-code, f'signal {-code}')}."
    return f"The worker ended with exit code {code}."
