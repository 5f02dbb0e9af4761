"""What the jailed tools have in common: they are ready when a jail can be made, and each call runs on a workspace."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from gateway.config import Settings
from gateway.errors import ToolUnavailable
from gateway.observability.logs import log_event
from gateway.tools.builtin.jail import WORKSPACE, Jail, JailUnavailable, Job, Outcome
from gateway.tools.builtin.workspaces import Held, Workspaces, folders_of_the_gateway
from gateway.tools.config import JailedTool
from gateway.tools.port import ProviderHealth, ProviderKind, ToolContext, ToolSpec

_log = logging.getLogger("gateway.tools")

_LET_IN = ("chmod", "-R", "u+rwX", WORKSPACE)
_MEND_S = 10.0
_MOST_SAID = 1_024


class JailedCalls:
    """Runs the calls of one entry in jails, and knows whether there can be any."""

    def __init__(self, entry: JailedTool, settings: Settings, *, shown: Sequence[Path] = ()) -> None:
        """Raise `ConfigError` for a workspace that cannot be one."""
        self.workspaces = Workspaces(entry, settings)
        self.health = ProviderHealth()
        self._entry = entry.name
        self._jail = Jail(entry.limits, hidden=folders_of_the_gateway(settings), shown=shown)

    async def probe(self) -> None:
        """Find out whether a jail can be made; the answer is in `health`, and in the log if it is no."""
        try:
            await self._jail.probe()
        except JailUnavailable as error:
            self._refused(error)
        else:
            self.health = ProviderHealth(status="ok", checked_at=time.time())

    async def run(
        self, command: Sequence[str], context: ToolContext, *, stdin: bytes, output_bytes: int, adds: int | None
    ) -> Outcome | None:
        """Run a command on the caller's workspace.

        ``adds`` is how many bytes it writes at the most, or None where nobody can know. None is returned where there
        is no room for them, or where it cannot be told whether there is. Raises `ToolUnavailable` where there is no
        jail.
        """
        if self.health.status == "down":
            raise self._unavailable()
        folder = await self.workspaces.open(context.principal.key_id)
        held = await self.workspaces.measure(folder)
        if not held.is_measured:
            await self._run(
                Job(command=_LET_IN, workspace=folder, seconds=_MEND_S, file_bytes=0, output_bytes=_MOST_SAID)
            )
            held = await self.workspaces.measure(folder)
        room, bound = self.workspaces.room(held), self.workspaces.bound(held)
        if (adds is None and not held.is_measured) or (adds or 0) > room:
            return None

        async def over() -> str | None:
            found = await self.workspaces.measure(folder, most=bound)
            return f"Stopped: {self.workspaces.full()}" if _exceeds(found, bound) else None

        job = Job(
            command=tuple(command),
            workspace=folder,
            seconds=context.seconds_to_work(),
            file_bytes=room,
            output_bytes=output_bytes,
            stdin=stdin,
            over=over if held.is_measured else None,
        )
        return await self._run(job)

    async def _run(self, job: Job) -> Outcome:
        try:
            return await self._jail.run(job)
        except JailUnavailable as error:
            self._log(error)
            raise ToolUnavailable(f"The tool '{self._entry}' cannot run: {error}", should_retry=False) from error

    def _refused(self, error: JailUnavailable) -> None:
        self.health = ProviderHealth(status="down", detail=str(error), checked_at=time.time())
        self._log(error)

    def _log(self, error: JailUnavailable) -> None:
        log_event(
            _log,
            "tool.jail.refused",
            level=logging.WARNING,
            tool_name=self._entry,
            message=str(error),
            details=error.details[:1_000],
        )

    def _unavailable(self) -> ToolUnavailable:
        return ToolUnavailable(
            f"The tool '{self._entry}' runs in a jail alone, and there is none: {self.health.detail}",
            should_retry=False,
        )


class JailedProvider:
    """One tool whose calls run in jails of their own: all of a `ToolProvider` but ``call``."""

    kind: ProviderKind
    description: ClassVar[str]
    parameters: ClassVar[dict[str, Any]]

    def __init__(self, config: JailedTool, settings: Settings, *, shown: Sequence[Path] = ()) -> None:
        """Raise `ConfigError` for a wrong workspace; ``shown`` are folders that calls see besides the system's."""
        self.entry = config.name
        self._config = config
        self._calls = JailedCalls(config, settings, shown=shown)

    async def open(self) -> None:
        """Find out whether there can be a jail; a failure shows in `health` and at each call."""
        await self._calls.probe()

    async def aclose(self) -> None:
        """Do nothing: every call ends its jail itself."""

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the one tool."""
        return (
            ToolSpec(
                name=self.entry,
                entry=self.entry,
                provider=self.kind,
                remote_name=self.entry,
                description=self._config.description or self.description,
                parameters=self.parameters,
            ),
        )

    async def refresh(self) -> None:
        """Do nothing: a refresh makes a new provider, which looks again."""

    def health(self) -> ProviderHealth:
        """Return whether a jail can be made."""
        return self._calls.health


def _exceeds(found: Held, bound: Held) -> bool:
    return found.files > bound.files or found.size > bound.size or not found.is_measured
