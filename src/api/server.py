"""GatewayServer: uvicorn's server on a socket of ours: signals, TLS, deadlines, and an end that is never late."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import uvicorn

from api.bootstrap import Gateway
from api.main import GatewayApp
from api.protocol import ConnectionLimits, GatewayProtocol
from api.tls import open_tls, reload_tls
from gateway.config import Settings

_HANDSHAKE_S = 10.0
_GRACE_S = 2.0
"""Seconds after the drain time in which streams that were told are to be gone, before they are cut."""
_LAST_S = 5
"""Seconds after the drain time when the process ends whatever it is doing: a tool may be holding its event loop."""

_GARBAGE_AFTER = 10_000
"""Objects more than there were at the last collection."""
_KEPT_BYTES = 16 * 1024 * 1024
_MAPPED_FROM_BYTES = 4 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

T = TypeVar("T")
_Message = MutableMapping[str, Any]


def _keep_freed_memory() -> None:
    """Keep a few megabytes of what large bodies leave, instead of giving each page back and asking for it again.

    With glibc's own thresholds, a prompt of 420 kB costs 130 page faults, a tenth of its time.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library than glibc has no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class StartRefused(Exception):
    """The gateway cannot start; the text is for whoever started it."""


class GatewayServer(uvicorn.Server):
    """Serves one application until a signal of ``stopping`` comes; a second one ends the process at once.

    ``app`` is started before the socket is listened to. ``loopback`` is a second socket, always without TLS, on which
    agents' own clients reach this very process. SIGHUP has the configuration reloaded, the certificate included.
    """

    def __init__(
        self,
        app: GatewayApp,
        settings: Settings,
        listener: socket.socket,
        *,
        loopback: socket.socket | None = None,
        stopping: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
        reloads: bool = True,
    ) -> None:
        self._startup = _Startup(app)
        self._app = app
        self._settings = settings
        self._sockets = [listener] if loopback is None else [listener, loopback]
        self._stopping = tuple(stopping)
        self._reloads = reloads and hasattr(signal, "SIGHUP")
        self._reload_task: asyncio.Task[None] | None = None
        self._tls = open_tls(settings)
        self.ready = asyncio.Event()
        super().__init__(
            uvicorn.Config(
                self._startup,
                loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
                http=GatewayProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=settings.drain_s + _GRACE_S,  # type: ignore[arg-type]
            )
        )

    @property
    def gateway(self) -> Gateway:
        """What start-up opened; only once `ready` is set."""
        assert self._app.gateway is not None, "the gateway has not started"
        return self._app.gateway

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve; raises `StartRefused` when the application does not start."""
        await super().serve(sockets or self._sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise StartRefused((self._startup.refusal or "The gateway did not start.").rstrip())
        limits = ConnectionLimits.of(self._settings)

        def connect() -> asyncio.Protocol:
            return GatewayProtocol(self.config, self.server_state, self.lifespan.state, loop, limits)

        loop = asyncio.get_running_loop()
        self.servers = []
        for number, listener in enumerate(sockets or ()):
            tls = self._tls if number == 0 else None
            server = await loop.create_server(
                connect,
                sock=listener,
                ssl=tls,
                backlog=self.config.backlog,
                ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
            )
            self.servers.append(server)
        self.started = True
        # What serves stays until the end, and a call leaves hardly any cycle: looking for garbage after every 700
        # objects, as Python does by itself, takes a twentieth of the time of a relayed call.
        gc.freeze()
        gc.set_threshold(_GARBAGE_AFTER)
        _keep_freed_memory()
        self.ready.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal; end at once at the second."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        if hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            signal.alarm(math.ceil(self._settings.drain_s) + _LAST_S)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals while serving, and put what was there back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def hang_up(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._begin_reload)

        before = {number: signal.signal(number, self.handle_exit) for number in self._stopping}
        if self._reloads:
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def reload(self) -> None:
        """Read the configuration again, and the certificate; what is wrong is logged, and the old one holds."""
        reload_tls(self._tls, self._settings)
        if self._app.gateway is not None:
            await self._app.gateway.refresher.reload_everything()

    def _begin_reload(self) -> None:
        if self._reload_task is None or self._reload_task.done():
            self._reload_task = asyncio.create_task(self.reload())


class _Startup:
    """The application, with its start-up refusal kept so that the command says it in its own words."""

    def __init__(self, app: GatewayApp) -> None:
        self._app = app
        self.refusal: str | None = None

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)  # type: ignore[arg-type]
            return

        async def note(message: _Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                self.refusal = message.get("message")
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await send(message)

        await self._app(scope, receive, note)  # type: ignore[arg-type]


def run(server: GatewayServer, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``work``, which serves, on a loop of the server's own."""
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        result = runner.run(work())
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)
    return result


def open_loopback(settings: Settings, *, shares_its_port: bool) -> socket.socket | None:
    """Return a socket on which agents' own clients reach this process, where the gateway's address would not do.

    It would not with TLS, whose certificate does not name the loopback address, with a host that leaves the loopback
    address out, and where other workers accept on the same port: they do not know this one's key.
    """
    reachable = settings.host in ("127.0.0.1", "localhost", "0.0.0.0", "::")
    if reachable and settings.tls_cert is None and not shares_its_port:
        return None
    return socket.create_server(("127.0.0.1", 0), backlog=256)
