"""`gateway dev`: one gateway process on this machine, which reloads agents as they change and says how to call them."""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib.util
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from api.bootstrap import Gateway
from api.main import create_app
from gateway.config import Settings
from gateway_cli.banner import render_banner
from gateway_cli.errors import CliError
from gateway_cli.settings import read_settings
from gateway_cli.state import announce, find_running

_DRAIN_S = 3
"""Seconds that live runs get at the end: whoever presses Ctrl-C waits."""
_GRACE_S = 5
_IN_USE = (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE))
_Message = MutableMapping[str, Any]


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; return 0 after one, 1 when start-up fails."""
    settings = read_settings(arguments.path)
    if not settings.is_development:
        raise CliError(
            "`gateway dev` is for development and GATEWAY_ENV says production; unset it, or run `uvicorn api.main:app`."
        )
    settings = replace(
        settings,
        host=arguments.host or settings.host,
        port=settings.port if arguments.port is None else arguments.port,
        agent_auto_reload=not arguments.no_watch,
        drain_s=min(settings.drain_s, _DRAIN_S),
    )
    listener = _listen(settings)
    settings = replace(settings, port=listener.getsockname()[1])
    signal.signal(signal.SIGTERM, _leave)
    try:
        return _serve(settings, listener)
    except (KeyboardInterrupt, _Stopped):
        return 0
    finally:
        listener.close()


class _Stopped(BaseException):
    """SIGTERM came; raised out of the event loop once uvicorn has shut down."""


class _Startup:
    """The application, with its start-up refusal kept so that the command says it in its own words."""

    def __init__(self, settings: Settings) -> None:
        self._app = create_app(settings)
        self.refusal: str | None = None
        self.complete = asyncio.Event()

    @property
    def gateway(self) -> Gateway:
        """What start-up opened, once `complete` is set."""
        assert self._app.gateway is not None
        return self._app.gateway

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)  # type: ignore[arg-type]
            return

        async def note(message: _Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.complete.set()
            elif message["type"] == "lifespan.startup.failed":
                self.refusal = message.get("message") or "The gateway did not start."
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await send(message)

        await self._app(scope, receive, note)  # type: ignore[arg-type]


def _serve(settings: Settings, listener: socket.socket) -> int:
    app = _Startup(settings)
    config = uvicorn.Config(
        app,
        loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = uvicorn.Server(config)
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_run_server(server, app, settings, listener))
    except SystemExit:  # uvicorn's word for a start-up that failed
        if app.refusal is None:
            raise
    if app.refusal is not None:
        raise CliError(app.refusal.rstrip())
    return 0


async def _run_server(server: uvicorn.Server, app: _Startup, settings: Settings, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{_address(host)}:{port}"
    greeting = asyncio.create_task(_greet(app, settings, url))
    try:
        with announce(settings, url):
            await server.serve(sockets=[listener])
    finally:
        greeting.cancel()
        with suppress(asyncio.CancelledError):
            await greeting


async def _greet(app: _Startup, settings: Settings, url: str) -> None:
    """Print the banner once the first load is through."""
    await app.complete.wait()
    await app.gateway.loaded.wait()
    print(render_banner(settings, url, app.gateway.holder.current), flush=True)


def _listen(settings: Settings) -> socket.socket:
    """Bind before anything is loaded, so that a port in use is said at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        running = find_running(settings)
        holder = (
            f" by the gateway with pid {running.pid}" if running and running.url.endswith(f":{settings.port}") else ""
        )
        if error.errno in _IN_USE:
            raise CliError(
                f"Port {settings.port} on {settings.host} is in use{holder}; stop that, or choose another with --port."
            ) from error
        raise CliError(f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}.") from error


def _address(host: str) -> str:
    """Return the host part of a URL that reaches a server listening on ``host`` from this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def _leave(signum: int, frame: FrameType | None) -> None:
    raise _Stopped
