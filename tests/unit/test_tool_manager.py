"""The manager over a provider of the test's own: lives of providers, places, names, what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Settings
from gateway.errors import ToolDenied, ToolFailed, ToolTimedOut, ToolUnavailable
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.tools.config import McpTools
from gateway.tools.manager import ToolManager
from gateway.tools.port import OnChange, ProviderHealth, ProviderKind, ToolContext, ToolResult, ToolSpec
from gateway.tools.table import ToolCaller, ToolTable

pytestmark = pytest.mark.anyio

ENTRY = "tools: [{name: srv, provider: mcp, url: 'https://x.example', timeout: 0.3, max_concurrency: 1}]"
CALLER = ToolCaller(
    principal=Principal(id="k", key_id="k", allow=(), allow_tools=("srv__*", "own")), request_id="r", source="api"
)


class Server:
    """A provider whose calls the test holds in its hand."""

    kind: ProviderKind = "mcp"

    def __init__(self, entry: McpTools, on_change: OnChange) -> None:
        self.entry, self.on_change = entry.name, on_change
        self.names = ["echo"]
        self.quarantined: str | None = None
        self.go, self.called, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.answer: Any = ToolResult(text="ok")
        self.ignores_cancellation = False

    async def open(self) -> None: ...

    async def refresh(self) -> None: ...

    async def aclose(self) -> None:
        self.closed.set()

    def list_tools(self) -> Sequence[ToolSpec]:
        return [
            ToolSpec(
                name=f"{self.entry}__{name}",
                entry=self.entry,
                provider="mcp",
                remote_name=name,
                description="",
                parameters={"type": "object"},
                quarantined=self.quarantined,
            )
            for name in self.names
        ]

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        self.called.set()
        while not self.go.is_set():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                if not self.ignores_cancellation:
                    raise
        if isinstance(self.answer, BaseException):
            raise self.answer
        result: ToolResult = self.answer
        return result

    def health(self) -> ProviderHealth:
        return ProviderHealth()


@asynccontextmanager
async def managed(tmp_path: Path, text: str = ENTRY) -> AsyncIterator[tuple[ToolManager, list[Server], Path]]:
    file = tmp_path / "tools.yaml"
    file.write_text(text, encoding="utf-8")
    made: list[Server] = []
    published: list[ToolTable] = []

    def open_server(entry: McpTools, on_change: OnChange) -> Server:
        made.append(Server(entry, on_change))
        return made[-1]

    manager = ToolManager(
        Settings(tool_config=file),
        Metrics(),
        publish=published.append,
        local_allowlist=lambda: (),
        open_mcp=open_server,
    )
    async with manager:
        assert published[-1] is manager.table
        yield manager, made, file


async def test_an_unchanged_server_keeps_its_sessions_and_a_changed_one_is_closed_after_its_last_call(
    tmp_path: Path,
) -> None:
    async with managed(tmp_path, ENTRY.replace("0.3", "30")) as (manager, made, file):
        await manager.reload()
        assert len(made) == 1
        running = asyncio.create_task(manager.call("srv__echo", {}, CALLER))
        await made[0].called.wait()
        file.write_text(ENTRY.replace("x.example", "y.example"), encoding="utf-8")
        await manager.reload()
        assert len(made) == 2
        assert not made[0].closed.is_set()
        made[0].go.set()
        assert (await running).text == "ok"
        await asyncio.wait_for(made[0].closed.wait(), 60)


async def test_what_is_still_running_is_closed_with_the_gateway(tmp_path: Path) -> None:
    async with managed(tmp_path, ENTRY.replace("0.3", "30")) as (manager, made, file):
        running = asyncio.create_task(manager.call("srv__echo", {}, CALLER))
        await made[0].called.wait()
        file.write_text("tools: []", encoding="utf-8")
        await manager.reload()
    assert made[0].closed.is_set()
    running.cancel()
    await asyncio.wait((running,))


async def test_a_stuck_call_keeps_its_place(tmp_path: Path) -> None:
    async with managed(tmp_path) as (manager, made, _):
        made[0].ignores_cancellation = True
        with pytest.raises(ToolTimedOut):
            await manager.call("srv__echo", {}, CALLER)
        with pytest.raises(ToolUnavailable, match="busy"):
            await manager.call("srv__echo", {}, CALLER)
        made[0].go.set()
        assert (await manager.call("srv__echo", {}, CALLER)).text == "ok"


async def test_a_list_that_changes_is_published_and_quarantine_stops_calls(tmp_path: Path) -> None:
    async with managed(tmp_path) as (manager, made, _):
        before = manager.table
        made[0].names.append("more")
        made[0].on_change()
        assert [tool.name for tool in manager.table] == ["srv__echo", "srv__more"]
        assert manager.table.find("srv__echo") is before.find("srv__echo")
        made[0].quarantined = "its description changed"
        made[0].on_change()
        with pytest.raises(ToolDenied, match="its description changed"):
            await manager.call("srv__echo", {}, CALLER)
        assert not made[0].called.is_set()
        assert manager.table.list_permitted(CALLER.principal, "mcp") == []


async def test_a_crash_and_a_cancellation_from_inside_are_failures(tmp_path: Path) -> None:
    async with managed(tmp_path) as (manager, made, _):
        made[0].go.set()
        for answer in (RuntimeError("secret"), asyncio.CancelledError()):
            made[0].answer = answer
            with pytest.raises(ToolFailed) as caught:
                await manager.call("srv__echo", {}, CALLER)
            assert "secret" not in caught.value.message


async def test_a_name_that_is_taken_stays_with_its_first_owner(tmp_path: Path) -> None:
    text = "tools: [{name: srv, provider: mcp, url: 'https://x.example'}, {name: srv__echo, provider: mcp, url: x}]"
    async with managed(tmp_path, text) as (manager, made, _):
        made[1].entry, made[1].names = "srv", ["echo"]
        made[1].on_change()
        found = manager.table.find("srv__echo")
        assert found is not None
        assert found.lease.provider is made[0]
