"""`gateway doctor`: checks of the installation and its configuration, one line each."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import gateway
from api.settings_check import check_settings
from api.tls import open_tls
from gateway.caching.config import load_cache
from gateway.config import Settings
from gateway.errors import ConfigError, GatewayError
from gateway.registry.declarations import load_declarations
from gateway.routing.config import load_routing
from gateway.security.keybook import KeyBook
from gateway.security.keys import Keyring
from gateway.security.stored import PEPPERED, StoredKey
from gateway.store.store import Store, database_url
from gateway.upstreams.config import load_upstreams
from gateway.usage.prices import load_prices
from gateway_cli.database import with_database
from gateway_cli.errors import CliError
from gateway_cli.listening import IN_USE, why_not
from gateway_cli.settings import database_words, read_settings
from gateway_cli.state import find_running
from gateway_cli.tools import check_tools

_ROOMS = ("api", "gateway", "gateway_cli", "sdk_adapter")


def run(arguments: argparse.Namespace) -> int:
    """Print one line per check; return 1 when one fails."""
    healthy = True
    for label, check in _checks(arguments.path):
        try:
            print(f"ok    {label}: {check()}")
        except (CliError, GatewayError) as error:
            healthy = False
            print(f"FAIL  {label}: {error.message}")
    return 0 if healthy else 1


def _checks(path: Path | None) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", _python
    yield "openai-agents", _sdk
    yield "packages", _packages
    yield "settings", lambda: _settings(path)
    try:
        settings = read_settings(path)
    except (CliError, GatewayError):
        return  # the line above says why
    yield "start", lambda: _start(settings)
    yield "state folder", lambda: _state_folder(settings)
    yield "agents folder", lambda: _agents_folder(settings)
    yield "agents.yaml", lambda: _declared(settings)
    names = cache(lambda: _upstreams(settings))
    yield "upstreams", lambda: ", ".join(f"{name} ({provider})" for name, provider in names().items())
    try:
        names()
    except GatewayError:
        pass  # said above, and routes lead to upstreams
    else:
        yield "routing", lambda: _routing(settings, names())
    yield "prices", lambda: _prices(settings)
    yield "cache", lambda: _cache(settings)
    yield "tools", lambda: check_tools(settings)
    stored: list[Sequence[StoredKey]] = []  # empty where they could not be read: then nobody knows them
    with suppress(ConfigError):  # a wrong address is said above
        database_url(settings)
        yield "database", lambda: _database(settings, stored)
    yield "keys", lambda: _keys(settings, stored[0] if stored else None)
    yield "port", lambda: _port(settings)


def _python() -> str:
    return f"{platform.python_version()} at {sys.executable}"


def _sdk() -> str:
    """The import name `agents` belongs to the SDK; a folder of that name earlier on the path would hide it."""
    spec = importlib.util.find_spec("agents")
    try:
        installed = distribution("openai-agents")
    except PackageNotFoundError as error:
        raise CliError("openai-agents is not installed; run pip install -r requirements.txt.") from error
    expected = Path(str(installed.locate_file("agents/__init__.py"))).resolve()
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    if found != expected:
        raise CliError(
            f"`import agents` finds {found or 'a folder without __init__.py'} instead of the SDK; move it or rename it."
        )
    return version("openai-agents")


def _packages() -> str:
    """Each of our package names must be ours, not another distribution's."""
    home = Path(gateway.__file__).resolve().parents[1]
    for name in _ROOMS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != home / name / "__init__.py":
            raise CliError(f"`import {name}` finds {origin}, not {home / name}; another package has the same name.")
    return str(home)


def _settings(path: Path | None) -> str:
    read_settings(path)
    known = {name for item in fields(Settings) for name in (item.metadata["env"], *item.metadata["aliases"])}
    unknown = sorted(name for name in os.environ if name.startswith("GATEWAY_") and name not in known)
    remarks = [f"{name} is no setting{_nearest(name, known)}" for name in unknown]
    return "; ".join(["every GATEWAY_* value is accepted", *remarks])


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _start(settings: Settings) -> str:
    check_settings(settings, is_alone=settings.workers == 1)
    open_tls(settings)
    return "the settings go together"


def _agents_folder(settings: Settings) -> str:
    root = settings.agents_root()
    if not root.is_dir():
        raise CliError(f"{root} does not exist; `gateway new Hello` makes it with a first agent.")
    if (root / "__init__.py").exists():
        raise CliError(f"{root / '__init__.py'} would hide the Agents SDK, whose import name is `agents`; delete it.")
    return str(root.resolve())


def _state_folder(settings: Settings) -> str:
    folder = settings.state_folder().absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CliError(f"{folder} cannot be written to; set GATEWAY_STATE_DIR to a folder that can.")
    return str(folder)


def _declared(settings: Settings) -> str:
    return ", ".join(declaration.id for declaration in load_declarations(settings).agents) or "none"


def _upstreams(settings: Settings) -> dict[str, str]:
    return {upstream.name: upstream.provider for upstream in load_upstreams(settings).upstreams}


def _routing(settings: Settings, names: dict[str, str]) -> str:
    return ", ".join(load_routing(settings, tuple(names)).models) or "no models in routing.yaml"


def _prices(settings: Settings) -> str:
    load_prices(settings)
    return _file(settings, "prices.yaml")


def _cache(settings: Settings) -> str:
    load_cache(settings)
    return _file(settings, "cache.yaml")


def _file(settings: Settings, name: str) -> str:
    return str(settings.config_file(name) or f"no {name}")


def _database(settings: Settings, found: list[Sequence[StoredKey]]) -> str:
    async def work(store: Store) -> str:
        if store.path is not None and not store.path.exists():
            found.append(())
            return "none yet; it is made when it is needed"
        book = KeyBook(store, settings.key_pepper)
        await book.refresh()
        keys = book.keys or ()
        found.append(keys)
        return f"{database_words(settings)}; {len(keys)} stored key{'s'[: len(keys) != 1]}"

    return with_database(settings, ("gateway.security.key_rows",), work)


def _keys(settings: Settings, stored: Sequence[StoredKey] | None) -> str:
    Keyring.load(settings, stored=stored)
    live = [key for key in stored or () if key.revoked_at is None]
    if settings.key_pepper is None and any(key.digest.startswith(PEPPERED) for key in live):
        raise CliError("GATEWAY_KEY_PEPPER is not set, and keys were stored with one: set it, or they do not work.")
    file = settings.config_file("security.yaml")
    return str(file) if file else "no security.yaml; this machine needs no key"


def _port(settings: Settings) -> str:
    running = find_running(settings)
    if running is not None:
        return f"a gateway runs at {running.url} (pid {running.pid})"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        if error.errno in IN_USE:
            raise CliError(f"{settings.port} on {settings.host} is in use; choose another with --port.") from error
        raise CliError(why_not(settings, error)) from error
    return f"{settings.port} on {settings.host} is free"
