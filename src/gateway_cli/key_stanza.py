"""The lines of security.yaml that let a fresh key in: they hold its digest, never the key."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from gateway.security.moments import in_utc
from gateway.security.stored import KeyOptions


def stanza(key_id: str, secret: str, options: KeyOptions, *, expires_at: float | None) -> str:
    """Return one entry of ``api_keys``, indented as it stands in the file; what is not said is inherited."""
    fields: dict[str, Any] = {
        "id": key_id,
        "hashed_key": hashlib.sha256(secret.encode()).hexdigest(),
        "scopes": list(options.scopes),
        **msgspec.to_builtins(options),
    }
    if "limits" in fields:
        fields["limits"] = {name: value for name, value in fields["limits"].items() if value is not None}
    if expires_at is not None:
        fields["expires_at"] = in_utc(expires_at).date().isoformat()
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]  # what is JSON is YAML
    return f"  - {lines[0]}\n" + "\n".join(f"    {line}" for line in lines[1:])
