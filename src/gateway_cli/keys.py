"""`gateway keys new NAME`: a fresh API key, shown once, and the lines of security.yaml that hold only its digest."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import secrets

from gateway_cli.errors import CliError


def run(arguments: argparse.Namespace) -> int:
    """Print the key and its stanza; nothing is written anywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", arguments.name):
        raise CliError(
            "A key's id is 1 to 64 letters, digits and . _ @ -, and begins with a letter or digit.", status=2
        )
    key = f"sk-gw-{secrets.token_urlsafe(32)}"
    lines = stanza(arguments.name, key, arguments.allow or ["*"], admin=arguments.admin, expires=arguments.expires)
    print("The key, shown this once:\n")
    print(f"    {key}\n")
    print("What to add under api_keys in security.yaml, which holds only its digest:\n")
    print(lines)
    return 0


def stanza(name: str, key: str, allow: list[str], *, admin: bool = False, expires: str | None = None) -> str:
    """Return the YAML of one entry of ``api_keys``, indented as it stands in the file."""
    scopes = "[chat, admin]" if admin else "[chat]"
    lines = [
        f"  - id: {_quote(name)}",
        f"    hashed_key: {_quote(hashlib.sha256(key.encode()).hexdigest())}",
        f"    allow_agents: [{', '.join(_quote(pattern) for pattern in allow)}]",
        f"    scopes: {scopes}",
    ]
    if expires is not None:
        lines.append(f"    expires_at: {_checked_day(expires)}")
    return "\n".join(lines)


def _checked_day(day: str) -> str:
    try:
        return datetime.date.fromisoformat(day).isoformat()
    except ValueError as error:
        raise CliError(f"{day!r} is not a date; write YYYY-MM-DD.", status=2) from error


def _quote(text: str) -> str:
    if not text or not text.isascii() or not text.isprintable():
        raise CliError(f"{text!r} is not a pattern over model ids, which are ASCII.", status=2)
    return json.dumps(text)  # a JSON string is a YAML double-quoted scalar
