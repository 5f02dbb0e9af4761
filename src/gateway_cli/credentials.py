"""Which key a command shows to a gateway when none is given: the environment's, else the development key."""

from __future__ import annotations

from gateway.config import Settings
from gateway.security.keys import DEV_KEY
from gateway_cli.client import get_json


def find_key(settings: Settings, url: str) -> str | None:
    """Return a key that the gateway at ``url`` accepts; None when it asks for one that this command does not know."""
    for key in (settings.api_key, DEV_KEY):
        if key is not None and get_json(url, "/v1/models", key)[0] == 200:
            return key
    return None
