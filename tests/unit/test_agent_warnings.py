"""What is odd about an agent that serves: told beside it, with file, line and fix."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loading import Bench, Shelf, open_bench, write


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench() as opened:
        yield opened


@pytest.fixture
def shelf(bench: Bench, tmp_path: Path) -> Iterator[Shelf]:
    with bench.catalogue(tmp_path.resolve()) as opened:
        yield opened


def test_an_output_type_that_fails_every_run_is_a_warning(shelf: Shelf, tmp_path: Path) -> None:
    text = """from dataclasses import dataclass
from agents import Agent
@dataclass
class Answer:
    anything: dict[str, str]
agent = Agent(name="Loose", output_type=Answer)
"""
    write(tmp_path, "Loose/agent.py", text)
    shelf.refresh()
    entry = shelf.entry("loose")
    (warning,) = entry.list_diagnostics()
    assert (entry.status, warning.code, warning.severity) == ("ready", "agent_setup", "warning")
    assert (warning.file, warning.line) == ("Loose/agent.py", 6)
    assert "output_type" in warning.message and "'Loose'" in warning.message and warning.fix


def test_an_mcp_server_that_cannot_be_reached_is_a_warning_while_it_lasts(
    bench: Bench, shelf: Shelf, tmp_path: Path
) -> None:
    text = """from agents import Agent
from agents.mcp import MCPServerStdio
server = MCPServerStdio(params={"command": "no-such-command-anywhere"}, name="shelf")
agent = Agent(name="Reader", mcp_servers=[server])
"""
    write(tmp_path, "Reader/agent.py", text)
    shelf.refresh()
    entry = shelf.entry("reader")

    async def told() -> None:
        while not entry.list_diagnostics():
            await asyncio.sleep(0.01)

    bench.run(told(), timeout_s=20)
    (warning,) = entry.list_diagnostics()
    assert (entry.status, warning.code, warning.severity) == ("ready", "mcp_unreachable", "warning")
    assert warning.file == "Reader/agent.py"
    assert "'shelf'" in warning.message and str(tmp_path) not in warning.message
    assert not entry.diagnostics, "what may mend itself is asked for, not kept"
