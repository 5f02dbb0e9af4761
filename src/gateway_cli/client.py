"""Asking a running gateway: one request, its status and its JSON."""

from __future__ import annotations

import http.client
import ipaddress
import json
import ssl
import urllib.parse
from typing import Any

from gateway.config import is_web_address
from gateway_cli.errors import CliError


def get_json(url: str, path: str, key: str | None, *, timeout_s: float = 10.0) -> tuple[int, Any]:
    """Return the status and the decoded answer (None when it is not JSON); raise `OSError` when nothing answers."""
    return send_json("GET", url, path, key, timeout_s=timeout_s)


def connect(url: str, timeout_s: float, *, shows_key: bool = True) -> http.client.HTTPConnection:
    """Return a connection, not yet open; raise `CliError` for what is no address.

    A key is shown to nobody but the holder of the certificate's name; on this very machine, where the certificate is
    for another name, to whoever listens.
    """
    if not is_web_address(url):
        raise CliError(f"{url} is not an address; write http://HOST:PORT.", status=2)
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    is_checked = shows_key and not _is_this_machine(host)
    context = ssl.create_default_context() if is_checked else ssl._create_unverified_context()
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def send_json(
    method: str, url: str, path: str, key: str | None, body: object = None, *, timeout_s: float = 10.0
) -> tuple[int, Any]:
    """Send a request, with ``body`` as JSON where there is one; else as `get_json`."""
    address = url if "://" in url else f"http://{url}"
    connection = connect(address, timeout_s)
    try:
        given = None if body is None else json.dumps(body)
        target = urllib.parse.urlsplit(address).path.rstrip("/") + path
        connection.request(method, target, given, {"x-api-key": key} if key else {})
        answer = connection.getresponse()
        body = answer.read()
    except ssl.SSLCertVerificationError as error:
        raise CliError(
            f"The certificate of {url} is not trusted here ({error.verify_message}). Address the gateway by the name "
            "that its certificate is for; on its own machine by 127.0.0.1."
        ) from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url} does not speak HTTP") from error
    finally:
        connection.close()
    try:
        return answer.status, json.loads(body)
    except ValueError:
        return answer.status, None
