"""Which installed packages have known vulnerabilities, asked of OSV (osv.dev); and which are not those of the lock."""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gateway_cli.errors import CliError

OSV = "https://api.osv.dev"
OWN = "agent-gateway"
_BOOTSTRAP = frozenset({"pip", "setuptools", "wheel"})
"""What `python -m venv` brings along; no lock names it."""
_TIMEOUT_S = 30.0
_MOST_BYTES = 16 * 1024 * 1024
_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PackageAudit:
    """How many packages are installed and how many of them were asked about, and what was found.

    ``vulnerable`` holds name, version and advisories, ``drifted`` name and difference to the lock, ``problem`` why not
    all could be asked about.
    """

    installed: int
    audited: int
    vulnerable: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    drifted: tuple[tuple[str, str], ...] = ()
    problem: str | None = None


def audit_packages(service: str, lock: Path | None = None) -> PackageAudit:
    """Ask ``service`` about every package of this Python, and compare them with ``lock``, a file of pins.

    A service that cannot be asked is told by the result, since a package nobody asked about is not known to be good.
    """
    installed = installed_packages()
    drifted = () if lock is None else _drift(installed, _pins(lock))
    try:
        answers = _ask(service, installed)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return PackageAudit(len(installed), 0, drifted=drifted, problem=f"{service} could not be asked: {error}.")
    vulnerable = tuple(
        (name, version, found)
        for (name, version), found in zip(installed.items(), answers, strict=False)
        if found is not None and found
    )
    return PackageAudit(len(installed), sum(found is not None for found in answers), vulnerable, drifted)


def installed_packages() -> dict[str, str]:
    """Return name and version of every distribution that this Python can import, our own left out."""
    found: dict[str, str] = {}
    for item in distributions():
        name = item.metadata["Name"]
        if name and _normal(name) != OWN:
            found.setdefault(_normal(name), item.version)  # the first on the path is the one that is imported
    return dict(sorted(found.items()))


def _ask(service: str, packages: Mapping[str, str]) -> list[tuple[str, ...] | None]:
    """Return the advisories of each package, None for one that the answer says nothing about."""
    if not service.startswith(("https://", "http://")):
        raise CliError(f"{service} is not an address; write https://HOST.", status=2)
    queries = [{"package": {"name": n, "ecosystem": "PyPI"}, "version": v} for n, v in packages.items()]
    request = urllib.request.Request(
        f"{service.rstrip('/')}/v1/querybatch",
        data=json.dumps({"queries": queries}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        results = json.loads(answer.read(_MOST_BYTES)).get("results")
    if not isinstance(results, list):
        raise ValueError("its answer has no results")
    return [_advisories(item) for item in results[: len(queries)]]


def _advisories(result: Any) -> tuple[str, ...] | None:
    if not isinstance(result, dict):
        return None
    return tuple(str(item.get("id")) for item in result.get("vulns") or ())


def _drift(installed: Mapping[str, str], pins: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, f"{version} is installed; the lock has {pins.get(name, 'no such package')}.")
        for name, version in installed.items()
        if name not in _BOOTSTRAP and pins.get(name) != version
    )


def _pins(lock: Path) -> dict[str, str]:
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise CliError(f"{lock} cannot be read ({error.strerror}).", status=2) from error
    pins = {_normal(name): version for name, version in _PIN.findall(text)}
    if not pins:
        raise CliError(f"{lock} pins nothing; name a file with lines like name==version.", status=2)
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
