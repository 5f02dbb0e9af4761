"""`gateway health`: whether the gateway on this machine serves; for health checks of containers, and for scripts."""

from __future__ import annotations

import argparse
import http.client
import json
from typing import Any

from gateway.config import Settings
from gateway_cli.client import connect
from gateway_cli.credentials import find_key
from gateway_cli.errors import CliError

_TIMEOUT_S = 5.0
_ALL_ASKED_S = 20.0


def run(arguments: argparse.Namespace) -> int:
    """Print what `/health`, `/readyz` or the providers' status answers; return 1 unless it is good."""
    settings = Settings.from_env()
    url = arguments.url or local_address(settings)
    path = "/api/v1/providers/status" if arguments.providers else "/readyz" if arguments.ready else "/health"
    try:
        key = (arguments.key or find_key(settings, url)) if arguments.providers else None
        status, body = _ask(url, path, key)
    except (OSError, http.client.HTTPException) as error:
        raise CliError(f"{url} does not answer ({error}).") from error
    if status in (401, 403):
        raise CliError(f"{url} wants an admin key for this; give one with --key or GATEWAY_API_KEY.")
    said = body.get("status")
    print(f"{url}{path}: {status}{f' {said}' if isinstance(said, str) else ''}")
    parts = _parts(body)
    width = max(map(len, parts), default=0)
    for name, word in parts.items():
        print(f"  {name:<{width}}  {word}")
    return 0 if status == 200 and said != "degraded" else 1


def local_address(settings: Settings) -> str:
    """Return the URL under which this machine reaches a gateway with these settings."""
    scheme = "http" if settings.tls_cert is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def _parts(body: dict[str, Any]) -> dict[str, str]:
    """Return what an answer says of each part, by its name."""
    found: dict[str, str] = {}
    for group in ("components", "needs", "checks"):
        parts = body.get(group)
        if isinstance(parts, dict):
            before = "needs " if group == "needs" else ""
            found |= {f"{before}{name}": word for name, word in parts.items() if isinstance(word, str)}
    return found


def _ask(url: str, path: str, key: str | None) -> tuple[int, dict[str, Any]]:
    # The certificate is for the name that clients use; without a key the question is only whether somebody serves.
    connection = connect(url, _ALL_ASKED_S if key else _TIMEOUT_S, shows_key=key is not None)
    try:
        connection.request("GET", path, headers={"x-api-key": key} if key else {})
        answer = connection.getresponse()
        return answer.status, _decoded(answer.read())
    finally:
        connection.close()


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(body)
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}
