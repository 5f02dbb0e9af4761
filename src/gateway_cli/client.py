"""Asking a running gateway: one request, its status and its JSON."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from gateway_cli.errors import CliError


def get_json(url: str, path: str, key: str | None, *, timeout_s: float = 10.0) -> tuple[int, Any]:
    """Return the status and the decoded answer (None when it is not JSON); raise `OSError` when nothing answers."""
    return send_json("GET", url, path, key, timeout_s=timeout_s)


def send_json(
    method: str, url: str, path: str, key: str | None, body: object = None, *, timeout_s: float = 10.0
) -> tuple[int, Any]:
    """Send a request, with ``body`` as JSON where there is one; else as `get_json`."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CliError(f"{url} is not an address; write http://HOST:PORT.", status=2)
    try:
        port = parts.port
    except ValueError as error:
        raise CliError(f"{url} has no valid port; write http://HOST:PORT.", status=2) from error
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, port, timeout=timeout_s)
    try:
        given = None if body is None else json.dumps(body)
        connection.request(method, parts.path.rstrip("/") + path, given, {"x-api-key": key} if key else {})
        answer = connection.getresponse()
        body = answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url} does not speak HTTP") from error
    finally:
        connection.close()
    try:
        return answer.status, json.loads(body)
    except ValueError:
        return answer.status, None
