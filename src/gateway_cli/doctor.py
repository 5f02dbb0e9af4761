"""`gateway doctor`: checks of the installation and its configuration, one line each."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import gateway
from api.settings_check import check_settings
from api.tls import open_tls
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.security.keys import Keyring
from gateway.upstreams.config import load_upstreams
from gateway_cli.errors import CliError
from gateway_cli.settings import read_settings
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
    yield "agents folder", lambda: _agents_folder(settings)
    yield "upstreams", lambda: _upstreams(settings)
    yield "tools", lambda: check_tools(settings)
    yield "keys", lambda: _keys(settings)
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
    return "every GATEWAY_* value is accepted"


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


def _upstreams(settings: Settings) -> str:
    config = load_upstreams(settings)
    return ", ".join(f"{upstream.name} ({upstream.provider})" for upstream in config.upstreams)


def _keys(settings: Settings) -> str:
    Keyring.load(settings)
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
        raise CliError(
            f"{settings.port} on {settings.host} is taken ({error.strerror}); choose another with --port."
        ) from error
    return f"{settings.port} on {settings.host} is free"
