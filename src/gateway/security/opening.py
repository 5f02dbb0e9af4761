"""Opens what verifies tokens, where `security.yaml` names issuers; a gateway with keys alone imports none of it."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.config import Settings
from gateway.security.config import SecurityConfig
from gateway.security.issuers import JwtIssuer

if TYPE_CHECKING:  # they import PyJWT
    from gateway.security.issuer_keys import IssuerBook
    from gateway.security.tokens import TokenVerifier


class Issuers:
    """The token issuers of one process; made by `open_issuers`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._book: IssuerBook | None = None
        self._task: asyncio.Task[None] | None = None
        self._entries: Sequence[JwtIssuer] = ()

    async def follow(self, config: SecurityConfig) -> TokenVerifier | None:
        """Return what verifies the tokens of a configuration; None where it names no issuer.

        Raises `ConfigError` for a file of keys that is wrong. Keys with an address are fetched in the background.
        """
        if self._book is None and not config.jwt:
            return None
        modules: list[Any] = [
            await asyncio.to_thread(importlib.import_module, f"gateway.security.{name}")
            for name in ("issuer_keys", "tokens")
        ]
        if self._book is None:
            self._book = modules[0].IssuerBook()
        keys = await self._book.follow(config.jwt)
        self._entries = config.jwt
        if self._task is None:
            self._task = asyncio.create_task(self._book.run())
        if not config.jwt:
            return None
        verifier: TokenVerifier = modules[1].TokenVerifier(
            config, keys, requests_per_minute=self._settings.rate_limit_per_minute
        )
        return verifier

    def referred_files(self) -> set[Path]:
        """Return the files of keys that `security.yaml` names."""
        named = [name for entry in self._entries for name in (entry.jwks_file, entry.public_key_file)]
        return {Path(name) for name in named if name is not None}

    async def aclose(self) -> None:
        """Stop following the issuers' keys."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task


@asynccontextmanager
async def open_issuers(settings: Settings) -> AsyncIterator[Issuers]:
    """Open the token issuers of a process."""
    issuers = Issuers(settings)
    try:
        yield issuers
    finally:
        await issuers.aclose()
