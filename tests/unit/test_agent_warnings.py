"""What is odd about an agent that serves: told beside it, with file, line and fix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loading import Bench, Shelf, open_bench, write
from tests.support.waiting import wait_for


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


def test_an_mcp_server_that_cannot_be_reached_is_a_warning_while_it_lasts(shelf: Shelf, tmp_path: Path) -> None:
    text = """from agents import Agent
from agents.mcp import MCPServerStdio
server = MCPServerStdio(params={"command": "no-such-command-anywhere"}, name="shelf")
agent = Agent(name="Reader", mcp_servers=[server])
"""
    write(tmp_path, "Reader/agent.py", text)
    shelf.refresh()
    entry = shelf.entry("reader")
    wait_for(lambda: bool(entry.list_diagnostics()), what="the server is known to be unreachable")
    (warning,) = entry.list_diagnostics()
    assert (entry.status, warning.code, warning.severity) == ("ready", "mcp_unreachable", "warning")
    assert warning.file == "Reader/agent.py"
    assert "'shelf'" in warning.message and str(tmp_path) not in warning.message
    assert not entry.diagnostics, "what may mend itself is asked for, not kept"


ENDINGS = {
    "run_sync": 'result = Runner.run_sync(agent, "Write a haiku.")\nprint(result.final_output)\n',
    "asyncio.run": "async def main():\n    await Runner.run(agent, 'x')\n\nasyncio.run(main())\n",
    "main": "def main():\n    try:\n        Runner.run_sync(agent, 'x')\n    except Exception:\n"
    "        raise SystemExit(1)\n"
    "\nmain()\n",
    "streamed": "async def main():\n    Runner.run_streamed(agent, 'x')\n\nasyncio.run(main())\n",
    "helper": "from . import helper\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_that_runs_its_agent_drops_in_unchanged(shelf: Shelf, tmp_path: Path, ending: str) -> None:
    text = (
        'import asyncio\nfrom agents import Agent, Runner\n\nagent = Agent(name="Script", instructions="Be brief.")\n\n'
    )
    write(tmp_path, "Script/helper.py", text + ENDINGS["run_sync"])
    write(tmp_path, "Script/agent.py", text + ENDINGS[ending])
    shelf.refresh()
    entry = shelf.entry("script")
    (warning,) = entry.list_diagnostics()
    assert (entry.status, warning.code, warning.severity) == ("ready", "run_at_import", "warning")
    if ending == "helper":
        assert (warning.file, warning.line) == ("Script/helper.py", 6)
    else:
        source = (text + ENDINGS[ending]).splitlines()
        assert warning.file == "Script/agent.py"
        assert warning.line and source[warning.line - 1].startswith(("result", "asyncio.run(", "main()"))


def test_a_script_without_an_agent_of_its_own_says_both(shelf: Shelf, tmp_path: Path) -> None:
    text = "from agents import Agent, Runner\n\ndef main():\n    Runner.run_sync(Agent(name='x'), 'hi')\n\nmain()\n"
    write(tmp_path, "Inside/agent.py", text)
    shelf.refresh()
    assert [item.code for item in shelf.entry("inside").diagnostics] == ["no_export", "run_at_import"]
