"""EntryBook: entries of tools made at run time, over HTTP; kept in the store, the same in every process.

What a request may name is less than what `tools.yaml` may: no command, no callable and no shell, for those run code
here; no file; of the environment only what the operator lists; and no address inside but those the operator lists.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from gateway.config import convert_values
from gateway.errors import ConfigError, Conflict, GatewayError, InvalidRequest, NotFound
from gateway.observability.logs import log_event
from gateway.store.store import Store
from gateway.tools.config import HttpTool, McpTools, OpenApiTools, Registration
from gateway.tools.secrets import texts_of

_log = logging.getLogger("gateway.tools")

POLL_S = 1.0
"""Seconds between two looks at the store: how late another process may learn of a change."""

RESERVED = frozenset({"servers", "search", "refresh", "mcp"})
"""Names that stand in paths below /tools."""

_MOST = 500
_KINDS = ("http", "openapi", "mcp")
_OF_THE_FILE = ("local", "shell", "file_ops", "research")
_OPERATORS = ("network", "command", "env", "cwd")
"""Keys of an entry that only the operator's file may have: they open the inside, or run something there."""

Registrable = HttpTool | OpenApiTools | McpTools


class Registered(Struct, frozen=True, kw_only=True):
    """One entry as it is kept; ``created_at`` is epoch seconds, ``created_by`` the id of a key."""

    entry: Registrable
    created_at: float
    created_by: str


class EntryBook:
    """The stored entries of one process; ``serve`` is given them whenever they have changed."""

    def __init__(self, store: Store, serve: Callable[[Sequence[Registrable]], Awaitable[None]]) -> None:
        self._store = store
        self._serve = serve
        self._revision = -1
        self._looking = asyncio.Lock()
        self.entries: tuple[Registered, ...] = ()

    async def refresh(self) -> None:
        """Read the entries if they have changed, and serve them; raises `StoreUnavailable`, and keeps what is known."""
        if self._revision < 0 and not self._may_exist():
            return
        await self._store.open()
        from gateway.tools import registered_rows  # noqa: PLC0415 - SQLAlchemy, when there is a store to read

        async with self._looking:  # whoever waits for another's look finds its entries served
            async with self._store.reading() as connection:
                revision = await registered_rows.revision(connection)
                if revision == self._revision:
                    return
                entries = await registered_rows.load(connection)
            self._revision = revision
            if entries != self.entries:
                self.entries = entries
                await self._serve([item.entry for item in entries])

    async def run(self) -> None:
        """Follow the store until cancelled."""
        while True:
            try:
                await self.refresh()
            except GatewayError:
                pass  # the store has said so in the log; what is known is served
            except Exception as error:  # noqa: BLE001 - a background loop: the next entry must be served after it
                log_event(_log, "tool.entries.failed", level=logging.ERROR, exc_info=error)
            await asyncio.sleep(POLL_S)

    def find(self, name: str) -> Registered | None:
        """Return the entry of a name, if there is one."""
        return next((item for item in self.entries if item.entry.name == name), None)

    async def add(self, entry: Registrable, *, by: str) -> Registered:
        """Keep a new entry. Raises `Conflict` for a name that is taken, and where there are too many."""
        made = Registered(entry=entry, created_at=time.time(), created_by=by)
        await self._store.open()
        from gateway.tools import registered_rows  # noqa: PLC0415 - SQLAlchemy, when there is a store to write

        async with self._store.transaction() as connection:
            await registered_rows.lock(connection)
            kept = await registered_rows.load(connection)
            if any(item.entry.name == entry.name for item in kept):
                raise Conflict(f"An entry '{entry.name}' was registered already; delete it first.", param="name")
            if len(kept) >= _MOST:
                raise Conflict(f"{_MOST} entries are registered, which is the most; delete some.")
            await registered_rows.write(connection, made)
        log_event(_log, "tool.entry.registered", entry=entry.name, key_id=by)
        await self.refresh()
        return made

    async def remove(self, name: str, *, by: str) -> None:
        """Forget an entry, its secrets included. Raises `NotFound`."""
        await self._store.open()
        from gateway.tools import registered_rows  # noqa: PLC0415 - SQLAlchemy, when there is a store to write

        async with self._store.transaction() as connection:
            await registered_rows.lock(connection)
            if not any(item.entry.name == name for item in await registered_rows.load(connection)):
                raise NotFound(f"No entry '{name[:64]}' is registered.")
            await registered_rows.erase(connection, name)
        log_event(_log, "tool.entry.deleted", level=logging.WARNING, entry=name, key_id=by)
        await self.refresh()

    def _may_exist(self) -> bool:
        path = self._store.path
        return self._store.is_shared or (path is not None and path.exists())


def read_entry(fields: Mapping[str, Any], registration: Registration) -> Registrable:
    """Return the entry that a request describes, with the keys of `tools.yaml`; else raise `InvalidRequest`."""
    kind = fields.get("provider")
    if kind not in _KINDS:
        told = f"; what has the provider {kind} stands in tools.yaml alone" if kind in _OF_THE_FILE else ""
        raise InvalidRequest(f"provider: one of {', '.join(_KINDS)}{told}.", param="provider")
    for key in _OPERATORS:
        if key in fields:
            raise InvalidRequest(f"{key}: only tools.yaml may say that; the operator keeps it.", param=key)
    try:
        entry: Registrable = convert_values(dict(fields), Registrable)
    except ConfigError as error:
        raise InvalidRequest(error.message) from error
    if entry.name in RESERVED:
        raise InvalidRequest(
            f"name: '{entry.name}' stands for something else below /tools; take another.", param="name"
        )
    problem = find_problem(entry, registration)
    if problem is not None:
        raise InvalidRequest(problem)
    return entry


def find_problem(entry: Registrable, registration: Registration) -> str | None:
    """Say what the operator does not allow an entry of a request to have; None where it may be served."""
    if not registration.enabled:
        return "tools.yaml switches entries of requests off (registration.enabled)."
    if isinstance(entry, McpTools) and (entry.url is None or entry.transport == "stdio"):
        return "url: give the address of a running MCP server; programs to start stand in tools.yaml alone."
    if isinstance(entry, OpenApiTools) and "://" not in entry.document:
        return "document: give its address; files are named in tools.yaml alone."
    for place, name in _references(entry):
        if name not in registration.secrets:
            return f"{place}: tools.yaml does not list this variable in registration.secrets."
    for place, text in texts_of(entry).items():
        if text.rpartition(" ")[2].startswith("file:"):
            return f"{place}: files are named in tools.yaml alone."
    return None


def with_network(entry: Registrable, registration: Registration) -> Registrable:
    """Return the entry as it is served: it reaches inside where the operator says so, and nowhere else."""
    served: Registrable = msgspec.structs.replace(entry, network=registration.network)
    return served


def _references(entry: Registrable) -> Iterator[tuple[str, str]]:
    for place, text in texts_of(entry).items():
        reference = text.rpartition(" ")[2]
        if reference.startswith("env:"):
            yield place, reference.removeprefix("env:")
