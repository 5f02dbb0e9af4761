"""One process that serves: alone, or as a worker of a supervisor that it tells when it does."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress

from api.main import create_app
from api.server import GatewayServer, StartRefused, open_loopback, run
from api.shared import catch_up
from gateway.config import Settings
from gateway.observability.totals import Changes
from gateway.workers.peer import CallFailed, Peer
from gateway.workers.sending import send_metrics
from gateway.workers.workers import Workers
from gateway_cli.errors import CliError
from gateway_cli.state import announce

REFUSED = 3
"""The exit code of a worker that could not start, and has told the supervisor why."""


def serve_alone(settings: Settings, listener: socket.socket, url: str) -> int:
    """Serve in this process until a signal."""
    server = _server(settings, listener, Workers())

    async def work() -> None:
        greeting = asyncio.create_task(_greet(server, url))
        try:
            await server.serve()
        finally:
            greeting.cancel()

    with announce(settings, url):
        try:
            run(server, work)
        except StartRefused as error:
            raise CliError(str(error)) from error
    return 0


def _adopt(descriptor: int) -> socket.socket:
    """Return a socket of the supervisor's, which no process that this one starts is to hold, too.

    MCP servers are started by uvloop, whose processes inherit whatever may be inherited.
    """
    adopted = socket.socket(fileno=descriptor)
    adopted.set_inheritable(False)
    return adopted


def main() -> int:
    """Serve as a worker: the sockets are inherited, the settings stand in the environment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--channel", type=int, required=True)
    arguments = parser.parse_args()
    # What the terminal sends to the whole group is the supervisor's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    settings = Settings.from_env()
    channel = Peer(_adopt(arguments.channel))
    workers = Workers(arguments.slot, settings.workers, channel)
    server = _server(settings, _adopt(arguments.listener), workers)

    async def work() -> int:
        await channel.open()
        company = [asyncio.create_task(_listen(channel)), asyncio.create_task(_report(server, channel, workers))]
        try:
            await server.serve()
        except StartRefused as error:
            with suppress(CallFailed):
                await channel.call("worker.refused", str(error), timeout_s=5)
            return REFUSED
        finally:
            for task in company:
                task.cancel()
            await asyncio.wait(company)
        return 0

    return run(server, work)


async def _greet(server: GatewayServer, url: str) -> None:
    await server.ready.wait()
    print(f"Agent Gateway answers at {url}", file=sys.stderr, flush=True)


async def _listen(channel: Peer) -> None:
    await channel.run()
    os.kill(os.getpid(), signal.SIGTERM)  # the supervisor is gone: end as if it had asked for it


async def _report(server: GatewayServer, channel: Peer, workers: Workers) -> None:
    """Say when this worker serves, then what it counts."""

    async def reload(_: object) -> None:
        await server.reload()

    async def ping(_: object) -> None:
        return

    channel.handle("worker.ping", ping)
    channel.handle("worker.reload", reload)
    await server.ready.wait()
    await channel.call("worker.serves", os.getpid(), timeout_s=30)
    await catch_up(server.gateway)
    await send_metrics(workers, Changes(server.gateway.metrics))


def _server(settings: Settings, listener: socket.socket, workers: Workers) -> GatewayServer:
    loopback = open_loopback(settings, shares_its_port=not workers.is_alone)
    app = create_app(settings, workers=workers, own_port=loopback.getsockname()[1] if loopback else None)
    stopping = (signal.SIGTERM, signal.SIGINT) if workers.is_alone else (signal.SIGTERM,)
    return GatewayServer(app, settings, listener, loopback=loopback, stopping=stopping, reloads=workers.is_alone)


if __name__ == "__main__":
    sys.exit(main())
