"""`gateway audit`: weak keys, forgotten modules and vulnerable packages, as JSON; the exit code says whether any."""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import gateway
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.observability.logs import configure_logging
from gateway.security.config import FILE, SecurityConfig, expiry, load_security
from gateway.security.keybook import KeyBook
from gateway.security.keys import DEV_KEY, digest
from gateway.security.stored import StoredKey
from gateway.store.store import DATABASE_FILE, Store, database_url
from gateway_cli.advisories import OSV, PackageAudit, audit_packages
from gateway_cli.settings import read_settings
from gateway_cli.unreferenced import find_unreferenced

_WEEK_S = 7 * 86_400
_KEY_MODULES = ("gateway.security.key_rows",)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to mend: its kind, what it is about, and what to do."""

    kind: str
    subject: str
    message: str


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 when there is a finding, or a package that could not be asked about."""
    settings = read_settings(arguments.path)
    if not os.environ.get("GATEWAY_ENV", "").strip():
        settings = replace(settings, environment="production")
    configure_logging("error", as_text=settings.log_format == "text")
    now = time.time()
    findings = [
        *audit_keys(load_security(settings), now, is_development=settings.is_development or _is_packaged(settings)),
        *_audit_store(settings, now),
        *(
            Finding("unreferenced_module", path, "No agent imports this file; delete it, or name it in an agent.")
            for path in find_unreferenced(settings)
        ),
    ]
    packages = None
    if not arguments.no_packages:
        packages = audit_packages(arguments.advisories or OSV, arguments.lock)
        findings += _of_packages(packages)
    report = {
        "timestamp": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "environment": settings.environment,
        "findings": [asdict(finding) for finding in findings],
        "totals": _totals(findings),
        "packages": None if packages is None else {"installed": packages.installed, "audited": packages.audited},
    }
    print(json.dumps(report, indent=2))
    return 1 if findings else 0


def audit_keys(config: SecurityConfig, now: float, *, is_development: bool) -> Iterator[Finding]:
    """Yield what is wrong with the keys of `security.yaml`; in development the shipped key is as it should be."""
    for key in config.api_keys:
        shown = key.hashed_key or digest(key.key or "")
        if hmac.compare_digest(shown.lower(), digest(DEV_KEY)):
            if not is_development:
                yield Finding("default_key", key.id, "This is the shipped development key; delete it.")
            continue
        if key.key is not None:
            yield Finding(
                "plaintext_key", key.id, "The file holds the key itself; write its sha256 under hashed_key instead."
            )
        yield from _of_expiry(key.id, expiry(key), now, "write expires_at")


def audit_stored_keys(keys: Sequence[StoredKey], now: float) -> Iterator[Finding]:
    """Yield what is wrong with keys made at run time; revoked ones are over."""
    for key in keys:
        if key.revoked_at is None:
            yield from _of_expiry(key.id, key.expires_at, now, "make another with --expires, and revoke this one")


def _of_expiry(name: str, expires_at: float | None, now: float, mend: str) -> Iterator[Finding]:
    if expires_at is None:
        yield Finding("key_without_expiry", name, f"The key never ends; {mend}.")
    elif expires_at <= now:
        yield Finding("expired_key", name, "The key has ended; delete it or revoke it.")
    elif expires_at - now < _WEEK_S:
        yield Finding("key_expiring", name, f"The key ends in {(expires_at - now) / 86_400:.1f} days.")


def _is_packaged(settings: Settings) -> bool:
    """Whether `security.yaml` is the one in the package, whose development key production refuses by itself."""
    path = settings.config_file(FILE)
    return path is not None and path.parent == Path(gateway.__file__).resolve().parent / "defaults"


def _audit_store(settings: Settings, now: float) -> list[Finding]:
    if settings.database_url is None and not (settings.state_folder() / DATABASE_FILE).exists():
        return []

    async def read() -> Sequence[StoredKey]:
        async with Store(database_url(settings), _KEY_MODULES) as store:
            book = KeyBook(store, settings.key_pepper)
            await book.refresh()
            return book.keys or ()

    try:
        return list(audit_stored_keys(asyncio.run(read()), now))
    except GatewayError as error:
        return [Finding("store_unreadable", "stored keys", error.message)]


def _of_packages(packages: PackageAudit) -> Iterator[Finding]:
    for name, version, advisories in packages.vulnerable:
        yield Finding("vulnerable_package", f"{name} {version}", f"Known: {', '.join(advisories)}.")
    for name, message in packages.drifted:
        yield Finding("package_not_locked", name, message)
    if packages.audited != packages.installed:
        yield Finding(
            "packages_not_audited",
            f"{packages.installed - packages.audited} of {packages.installed}",
            packages.problem or "The service did not answer for all of them.",
        )


def _totals(findings: Sequence[Finding]) -> dict[str, int]:
    kinds = sorted({finding.kind for finding in findings})
    return {kind: sum(finding.kind == kind for finding in findings) for kind in kinds} | {"all": len(findings)}
