"""Pins: which definition of each MCP tool somebody has accepted, by hash; what changed since is not offered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import Struct

if TYPE_CHECKING:  # the store reads this module without reading `mcp`
    from gateway.store.store import Store
    from gateway.tools.mcp.listing import ListedTool

Pinning = Literal["first_use", "approve"]
"""Whether the first list of a server is accepted as it is, or waits for an admin."""


class Pin(Struct, frozen=True):
    """An accepted definition, and who accepted it (a key's id, or ``first use``)."""

    digest: str
    definition: str
    by: str


class Quarantine(Struct, frozen=True):
    """A tool that is not offered until somebody approves it."""

    tool: ListedTool
    why: Literal["new", "changed"]


class PinStore(Protocol):
    """Where pins are kept, by server and tool. Raises `StoreUnavailable`."""

    async def load(self, server: str) -> Mapping[str, Pin]:
        """Return the server's pins by tool; empty for a server never seen."""
        ...

    async def save(self, server: str, pins: Mapping[str, Pin], *, only_first: bool = False) -> None:
        """Add or replace pins; with ``only_first``, nothing where the server has any."""
        ...


class MemoryPins:
    """Pins of one process, gone with it."""

    def __init__(self) -> None:
        self._pins: dict[str, dict[str, Pin]] = {}

    async def load(self, server: str) -> Mapping[str, Pin]:
        """See `PinStore`."""
        return dict(self._pins.get(server, {}))

    async def save(self, server: str, pins: Mapping[str, Pin], *, only_first: bool = False) -> None:
        """See `PinStore`."""
        if not (only_first and self._pins.get(server)):
            self._pins.setdefault(server, {}).update(pins)


class SqlPins:
    """Pins in the gateway's store, shared by all that share it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def load(self, server: str) -> Mapping[str, Pin]:
        """See `PinStore`."""
        async with self._store.reading() as connection:
            from gateway.tools.mcp import pin_table  # noqa: PLC0415 - SQLAlchemy: only where pins are kept

            return await pin_table.load(connection, server)

    async def save(self, server: str, pins: Mapping[str, Pin], *, only_first: bool = False) -> None:
        """See `PinStore`."""
        async with self._store.transaction() as connection:
            from gateway.tools.mcp import pin_table  # noqa: PLC0415 - SQLAlchemy: only where pins are kept

            if not (only_first and await pin_table.load(connection, server)):
                await pin_table.save(connection, server, pins)


def pin_key(name: str, identity: Iterable[str]) -> str:
    """Return the name under which a server's pins are kept: another command or address is another server."""
    return f"{name}:{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:32]}"


def judge(tools: Sequence[ListedTool], pins: Mapping[str, Pin]) -> tuple[list[ListedTool], list[Quarantine]]:
    """Part the tools into those that are as they were accepted and the rest."""
    offered = [tool for tool in tools if tool.name in pins and pins[tool.name].digest == tool.digest]
    known = {tool.name for tool in offered}
    rest = [Quarantine(t, "changed" if t.name in pins else "new") for t in tools if t.name not in known]
    return offered, rest


def accepted(tools: Iterable[ListedTool], by: str) -> dict[str, Pin]:
    """Return pins that accept the tools as they are."""
    return {tool.name: Pin(tool.digest, tool.definition, by) for tool in tools}
