"""Secrets by reference: `env:NAME` and `file:/path` become their value when they are used, never in the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.errors import ConfigError

_LARGEST_FILE = 64 * 1024


def resolve_secret(text: str, *, where: str, env: Mapping[str, str] | None = None) -> str:
    """Return the text that a reference stands for; anything else is returned as it is.

    ``where`` names the place for the `ConfigError` that a missing variable or file raises. A reference may stand
    behind a scheme word: ``Bearer env:TOKEN``.
    """
    scheme, space, rest = text.rpartition(" ")
    if rest.startswith("env:"):
        name = rest.removeprefix("env:")
        value = (os.environ if env is None else env).get(name)
        if not value:
            raise ConfigError(f"{where}: the environment variable {name} is not set.")
    elif rest.startswith("file:"):
        value = _read(Path(rest.removeprefix("file:")), where)
    else:
        return text
    return f"{scheme}{space}{value}"


def resolve_headers(headers: Mapping[str, str], *, where: str) -> dict[str, str]:
    """Return the headers with their secrets in place; `ConfigError` for one that is missing or no header."""
    resolved = {}
    for name, text in headers.items():
        value = resolve_secret(text, where=f"{where}: headers: {name}")
        if not name.isascii() or not name.isprintable() or " " in name or ":" in name or not name:
            raise ConfigError(f"{where}: {name!r} is not the name of a header.")
        if any(ord(c) < 32 or ord(c) == 127 for c in value) or not value.isascii():
            raise ConfigError(f"{where}: headers: {name}: the value has characters that no header may have.")
        resolved[name.lower()] = value
    return resolved


def files_of(entry: Any) -> set[Path]:
    """Return the files that an entry reads: secrets in its headers and environment, and a document."""
    files = {Path(path) for text in texts_of(entry).values() if (path := _file_of(text)) is not None}
    document = getattr(entry, "document", None)
    if isinstance(document, str) and "://" not in document:
        files.add(Path(document))
    return files


def _file_of(text: str) -> str | None:
    reference = text.rpartition(" ")[2]
    return reference.removeprefix("file:") if reference.startswith("file:") else None


def _read(path: Path, where: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        value = raw.decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: the secret file {path.name} cannot be read.") from error
    if not value or len(raw) > _LARGEST_FILE:
        raise ConfigError(f"{where}: the secret file {path.name} is empty or larger than {_LARGEST_FILE:,} bytes.")
    return value


def secrets_of(entry: Any) -> dict[str, str | None]:
    """Return what the references in an entry's headers and environment stand for now; None for one that is missing."""
    found: dict[str, str | None] = {}
    for name, text in texts_of(entry).items():
        try:
            found[name] = resolve_secret(text, where=name)
        except ConfigError:
            found[name] = None
    return found


def texts_of(entry: Any) -> dict[str, str]:
    """Return the texts of an entry that may refer to secrets, by where they stand."""
    groups = {name: getattr(entry, name, None) or {} for name in ("headers", "env")}
    groups |= {f"key_headers.{key}": headers for key, headers in (getattr(entry, "key_headers", None) or {}).items()}
    return {f"{group}.{name}": text for group, texts in groups.items() for name, text in texts.items()}
