"""`gateway dev`: one gateway process on this machine, which reloads agents as they change and says how to call them."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace

from api.main import create_app
from api.server import GatewayServer, StartRefused, open_loopback
from api.server import run as run_server
from gateway.config import Settings
from gateway_cli.banner import render_banner
from gateway_cli.errors import CliError
from gateway_cli.listening import address_of, listen
from gateway_cli.settings import read_settings
from gateway_cli.state import announce

_DRAIN_S = 3
"""Seconds that live runs get at the end: whoever presses Ctrl-C waits."""


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; return 0 after one, 1 when start-up fails."""
    settings = read_settings(arguments.path)
    if not settings.is_development:
        raise CliError(
            "`gateway dev` is for development and GATEWAY_ENV says production; unset it, or run `gateway serve`."
        )
    settings = replace(
        settings,
        host=arguments.host or settings.host,
        port=settings.port if arguments.port is None else arguments.port,
        agent_auto_reload=not arguments.no_watch,
        log_exception_text=True,
        drain_s=min(settings.drain_s, _DRAIN_S),
    )
    listener = listen(settings)
    settings = replace(settings, port=listener.getsockname()[1])
    url = address_of(settings, listener)
    loopback = open_loopback(settings, shares_its_port=False)
    app = create_app(settings, own_port=loopback.getsockname()[1] if loopback else None)
    server = GatewayServer(app, settings, listener, loopback=loopback)

    async def work() -> None:
        greeting = asyncio.create_task(_greet(server, settings, url))
        try:
            await server.serve()
        finally:
            greeting.cancel()

    try:
        with announce(settings, url):
            run_server(server, work)
    except StartRefused as error:
        raise CliError(str(error)) from error
    finally:
        listener.close()
    return 0


async def _greet(server: GatewayServer, settings: Settings, url: str) -> None:
    """Print the banner once the first load is through."""
    await server.ready.wait()
    await server.gateway.loaded.wait()
    if server.should_exit:  # stopped while it loaded: nothing answers any more
        return
    print(render_banner(settings, url, server.gateway.holder.current), flush=True)
