"""The socket that `gateway dev` and `gateway serve` listen on, bound before anything is loaded."""

from __future__ import annotations

import errno
import os
import socket

from gateway.config import Settings
from gateway_cli.errors import CliError
from gateway_cli.state import find_running

IN_USE = (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE))


def listen(settings: Settings) -> socket.socket:
    """Return the socket of the settings' address; a port in use is said at once, as a `CliError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        running = find_running(settings)
        holder = (
            f" by the gateway with pid {running.pid}" if running and running.url.endswith(f":{settings.port}") else ""
        )
        if error.errno in IN_USE:
            raise CliError(
                f"Port {settings.port} on {settings.host} is in use{holder}; stop that, or choose another with --port."
            ) from error
        raise CliError(why_not(settings, error)) from error


def why_not(settings: Settings, error: OSError) -> str:
    """Say why the address cannot be listened on, when it is not in use."""
    number = error.errno or 0  # below zero: the name leads nowhere
    if number < 0 or number == errno.EADDRNOTAVAIL:
        help_ = "it is no address of this machine; choose one with --host"
    elif number == errno.EACCES:
        help_ = "this user may not take that port; choose one above 1023 with --port"
    else:  # create_server adds the address to the system's words
        help_ = os.strerror(number) if number else str(error)
    return f"Cannot listen on {settings.host}:{settings.port}: {help_}."


def address_of(settings: Settings, listener: socket.socket) -> str:
    """Return the URL under which this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
