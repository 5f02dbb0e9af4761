"""`gateway health`: whether the gateway on this machine serves; for health checks of containers, and for scripts."""

from __future__ import annotations

import argparse
import http.client
import ssl
from urllib.parse import urlsplit

from gateway.config import Settings
from gateway_cli.errors import CliError

_TIMEOUT_S = 5.0


def run(arguments: argparse.Namespace) -> int:
    """Print what `/health`, or `/readyz`, answers; return 1 unless it is 200."""
    url = arguments.url or local_address(Settings.from_env())
    path = "/readyz" if arguments.ready else "/health"
    try:
        status = _ask(url, path)
    except (OSError, http.client.HTTPException) as error:
        raise CliError(f"{url} does not answer ({error}).") from error
    print(f"{url}{path}: {status}")
    return 0 if status == 200 else 1


def local_address(settings: Settings) -> str:
    """Return the URL under which this machine reaches a gateway with these settings."""
    scheme = "http" if settings.tls_cert is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def _ask(url: str, path: str) -> int:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CliError(f"{url} is not an address; write http://HOST:PORT.", status=2)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    if parts.scheme == "https":
        # The certificate is for the name that clients use; here the question is only whether somebody serves.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
