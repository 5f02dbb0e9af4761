"""`gateway keys create|list|rotate|revoke`: the keys of the gateway's database, from the machine that reaches it.

`create --yaml` alone touches no database: it prints what to add to security.yaml.
"""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime

from gateway.config import Settings
from gateway.errors import ConfigError, InvalidRequest
from gateway.security.config import load_security
from gateway.security.keybook import KeyBook, MadeKey
from gateway.security.moments import end_of, in_utc, shown
from gateway.security.stored import (
    PEPPERED,
    KeyOptions,
    StoredKey,
    check_new_key,
    check_pepper,
    new_secret,
    read_options,
)
from gateway.store.store import Store
from gateway_cli.database import with_database
from gateway_cli.errors import CliError
from gateway_cli.key_stanza import stanza
from gateway_cli.settings import database_words, read_store_settings

_MODULES = ("gateway.security.key_rows",)


def run(arguments: argparse.Namespace) -> int:
    """Do what ``arguments.action`` says; a gateway that runs on the same database follows within a second."""
    settings = read_store_settings(arguments.path)
    check_pepper(settings)
    if arguments.action == "create":
        _check_new(arguments, settings)
        if arguments.yaml:
            _print_stanza(arguments)
            return 0
    actions: dict[str, Callable[[KeyBook, argparse.Namespace], Awaitable[None]]] = {
        "create": _create,
        "list": _list,
        "rotate": _rotate,
        "revoke": _revoke,
    }

    async def work(store: Store) -> bool:
        book = KeyBook(store, settings.key_pepper)
        await book.refresh()
        is_peppered = any(key.digest.startswith(PEPPERED) for key in book.keys or () if key.revoked_at is None)
        await actions[arguments.action](book, arguments)
        return is_peppered

    is_peppered = with_database(settings, _MODULES, work)
    if is_peppered and settings.key_pepper is None and arguments.action in ("create", "rotate"):
        print("GATEWAY_KEY_PEPPER is not set here, and other keys have it: this one works without.", file=sys.stderr)
    print(f"Database: {database_words(settings)}", file=sys.stderr)
    return 0


def _check_new(arguments: argparse.Namespace, settings: Settings) -> None:
    try:
        check_new_key(arguments.name, _expiry(arguments.expires))
        _options(arguments)
    except InvalidRequest as error:
        raise CliError(error.message, status=2) from error
    try:
        listed = load_security(settings).api_keys
    except ConfigError as error:
        if not arguments.yaml:
            raise
        listed = []  # the entry may be what mends the file
        print(f"Mend the file as well: {error.message}", file=sys.stderr)
    if any(key.id == arguments.name for key in listed):
        raise CliError(f"security.yaml has a key with the id '{arguments.name}'; take another.", status=2)


def _print_stanza(arguments: argparse.Namespace) -> None:
    secret = new_secret()
    lines = stanza(arguments.name, secret, _options(arguments), expires_at=_expiry(arguments.expires))
    if arguments.json:
        print(json.dumps({"id": arguments.name, "key": secret, "yaml": lines}, indent=2))
        return
    print(f"The key, shown this once:\n\n    {secret}\n")
    print(f"What to add under api_keys in security.yaml, which holds only its digest:\n\n{lines}")


async def _create(book: KeyBook, arguments: argparse.Namespace) -> None:
    options, expires_at = _options(arguments), _expiry(arguments.expires)
    made = await book.create(arguments.name, options, expires_at=expires_at, created_by=_who())
    _show_secret(made, arguments, "The key, shown this once:")


def _options(arguments: argparse.Namespace) -> KeyOptions:
    fields: dict[str, object] = {
        "allow_agents": arguments.allow,
        "allow_tools": arguments.allow_tool,
        "scopes": ["chat", "admin"] if arguments.admin else ["chat"],
        "description": arguments.description,
        "namespace": arguments.namespace,
        "profile": arguments.profile,
        "limits": _limits(arguments),
    }
    return read_options({name: value for name, value in fields.items() if value is not None})


async def _list(book: KeyBook, arguments: argparse.Namespace) -> None:
    keys = book.keys or ()
    if arguments.json:
        print(json.dumps([_record(key) for key in keys], indent=2))
        return
    if not keys:
        print("The database has no keys; `gateway keys create NAME` makes one. Those of security.yaml stand there.")
        return
    rows = [("ID", "STATE", "EXPIRES", "SCOPES", "REACHES")]
    rows += [
        (
            key.id,
            _state(key),
            _day(key.expires_at),
            ",".join(key.options.scopes),
            ", ".join(key.options.allow_agents) if key.options.allow_agents is not None else "(defaults)",
        )
        for key in keys
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]).rstrip())


async def _rotate(book: KeyBook, arguments: argparse.Namespace) -> None:
    made = await book.rotate(arguments.name, grace_s=arguments.grace * 3_600.0, by=_who())
    old = f"works for {arguments.grace:g} h more" if arguments.grace else "is refused from now on"
    _show_secret(made, arguments, f"The new key, shown this once; the old one {old}:")


async def _revoke(book: KeyBook, arguments: argparse.Namespace) -> None:
    key = await book.revoke(arguments.name, by=_who())
    print(f"'{key.id}' is revoked: gateways on this database refuse it, and end its open streams, within a second.")


def _show_secret(made: MadeKey, arguments: argparse.Namespace, text: str) -> None:
    if arguments.json:
        print(json.dumps({**_record(made.key), "key": made.secret}, indent=2))
    else:
        print(f"{text}\n\n    {made.secret}\n")


def _record(key: StoredKey) -> dict[str, object]:
    return {
        "id": key.id,
        "state": _state(key),
        "description": key.options.description,
        "scopes": list(key.options.scopes),
        "allow_agents": key.options.allow_agents,
        "namespace": key.options.namespace,
        "created_by": key.created_by,
        "created_at": shown(key.created_at),
        "expires_at": shown(key.expires_at),
        "revoked_at": shown(key.revoked_at),
    }


def _state(key: StoredKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= datetime.now(UTC).timestamp() else "active"


def _limits(arguments: argparse.Namespace) -> dict[str, object] | None:
    given = {
        "requests_per_minute": arguments.requests_per_minute,
        "tokens_per_minute": arguments.tokens_per_minute,
        "cost_per_day_usd": arguments.cost_per_day,
    }
    limits = {name: value for name, value in given.items() if value is not None}
    return limits or None


def _expiry(day: str | None) -> float | None:
    if day is None:
        return None
    try:
        return end_of(date.fromisoformat(day))
    except ValueError as error:
        raise CliError(f"{day!r} is not a date; write YYYY-MM-DD.", status=2) from error


def _day(moment: float | None) -> str:
    return "never" if moment is None else in_utc(moment).date().isoformat()


def _who() -> str:
    try:
        return f"command line ({getpass.getuser()})"
    except (KeyError, OSError):
        return "command line"
