"""`gateway serve`: the gateway in production, as one process or as several workers under a supervisor."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import replace

from api.tls import open_tls
from gateway.config import Settings
from gateway_cli.errors import CliError
from gateway_cli.listening import address_of, listen
from gateway_cli.settings import read_settings

if sys.platform != "win32":
    import resource


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; return 0 after one, 1 when start-up fails."""
    settings = read_settings(arguments.path)
    if not os.environ.get("GATEWAY_ENV", "").strip():
        settings = replace(settings, environment="production")
    settings = replace(
        settings,
        host=arguments.host or settings.host,
        port=settings.port if arguments.port is None else arguments.port,
        workers=arguments.workers or settings.workers,
        tls_cert=arguments.tls_cert or settings.tls_cert,
        tls_key=arguments.tls_key or settings.tls_key,
    )
    open_tls(settings)  # a wrong certificate is said before anything starts
    _raise_file_limit(settings)
    listener = listen(settings)
    settings = replace(settings, port=listener.getsockname()[1])
    url = address_of(settings, listener)
    try:
        if settings.workers > 1:
            if os.name == "nt":
                raise CliError("--workers needs a Unix system; run one process, or several behind a load balancer.")
            # Deferred: a supervisor never imports what its workers serve with, and one process needs no supervisor.
            from gateway_cli.supervisor import supervise  # noqa: PLC0415

            return supervise(settings, listener, url)
        from gateway_cli.worker import serve_alone  # noqa: PLC0415

        return serve_alone(settings, listener, url)
    finally:
        listener.close()


def _raise_file_limit(settings: Settings) -> None:
    """Allow as many open files as connections need: each has one, and so has each of its upstream calls."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.max_connections + 1_024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
