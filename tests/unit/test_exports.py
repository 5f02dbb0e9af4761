"""Which agents a file publishes, under what name; factories; ``__gateway__``; and what is said when it is unclear."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.entry import AgentOptions, Diagnostic
from gateway.registry.loading import LoadFailed
from gateway.registry.policy import ModulePolicy
from sdk_adapter.building import Built, build
from sdk_adapter.modules import DropInFinder
from tests.support.loading import dropin_at, write

NAMES = ("agent", "root_agent", "main_agent", "app", "build_agent", "create_agent", "get_agent")
HEAD = "from agents import Agent\n"


def load(root: Path, source: str, *, names: tuple[str, ...] = NAMES) -> Built:
    write(root, "Some/agent.py", HEAD + source)
    with DropInFinder().installed() as finder:
        dropin = dropin_at(root.resolve())
        built = asyncio.run(build(dropin, 1, finder, names=names, policy=ModulePolicy(), timeout_s=5))
        built.generation.release()
        return built


def published(root: Path, source: str, **options: Any) -> dict[str, str]:
    """Return suffix → name of the agent; the suffix of the one with the folder's name is empty."""
    return {export.suffix or "": agent.name for export, agent in load(root, source, **options).agents}


def problem(root: Path, source: str, **options: Any) -> Diagnostic:
    with pytest.raises(LoadFailed) as caught:
        load(root, source, **options)
    [found] = caught.value.diagnostics
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("agent = Agent(name='A')\nother = Agent(name='B')", {"": "A"}),
        ("root_agent = Agent(name='R')\nmain_agent = root_agent", {"": "R"}),
        ("root_agent = Agent(name='R')\nagent = Agent(name='A')", {"": "A", "root_agent": "R"}),
        ("main_agent = Agent(name='M')\nagent = Agent(name='A', handoffs=[main_agent])", {"": "A"}),
        ("app = object()\nassistant = Agent(name='X')", {"": "X"}),
        ("agent = None\ndef build_agent(): return Agent(name='F')", {"": "F"}),
        ("def agent(): return Agent(name='F')", {"": "F"}),
        ("def create_agent(): return Agent(name='C')\ndef build_agent(): return Agent(name='B')", {"": "B"}),
        ("agent = Agent(name='A')\ndef build_agent(): raise AssertionError", {"": "A"}),
        ("anything = Agent(name='Only')", {"": "Only"}),
        ("a = Agent(name='A')\nb = Agent(name='B', handoffs=[a])", {"": "B"}),
        ("a = Agent(name='A')\nb = Agent(name='B', tools=[a.as_tool('t', 'd')])", {"": "B"}),
        (
            "from agents import handoff\na = Agent(name='A')\nb = Agent(name='B', handoffs=[handoff(a)])\nb2 = b",
            {"": "B"},
        ),
        ("__agents__ = ['b']\na = Agent(name='A')\nb = Agent(name='B')\nagent = a", {"": "B"}),
        ("a = Agent(name='A')\nagent = Agent(name='B')\n__agents__ = ['a', 'agent']", {"": "B", "a": "A"}),
        ("a = Agent(name='Same')\nb = Agent(name='Same')\n__agents__ = (a, b)", {"": "Same", "b": "Same"}),
        ("__agents__ = [Agent(name='Un Named'), Agent(name='Two')]", {"": "Un Named", "two": "Two"}),
        ("a = Agent(name='A')\n__agents__ = {'x': a, 'some': Agent(name='S')}", {"": "S", "x": "A"}),
        ("def make(): return Agent(name='F')\n__agents__ = ['make']", {"": "F"}),
        ("from agents.sandbox import SandboxAgent\nagent = SandboxAgent(name='Box')", {"": "Box"}),
    ],
)
def test_the_root_rule(tmp_path: Path, source: str, expected: dict[str, str]) -> None:
    assert published(tmp_path, source) == expected


def test_where_all_hand_to_each_other_it_is_the_one_the_file_runs(tmp_path: Path) -> None:
    source = """
import asyncio
from agents import Runner
triage = Agent(name='Triage')
faq = Agent(name='FAQ', handoffs=[triage])
triage.handoffs.append(faq)
async def main():
    current = triage
    await Runner.run(current, "hi")
if __name__ == "__main__":
    asyncio.run(main())
"""
    assert published(tmp_path, source) == {"": "Triage"}


def test_names_come_from_the_settings(tmp_path: Path) -> None:
    source = "agent = Agent(name='A')\nfirst = Agent(name='F')\nsecond = Agent(name='S')"
    assert published(tmp_path, source, names=("second", "first")) == {"": "S", "first": "F"}


@pytest.mark.parametrize(
    "source",
    [
        "async def build_agent(): return Agent(name='F')",
        "import asyncio\nasync def build_agent():\n    await asyncio.sleep(0)\n    return Agent(name='F')",
        "def build_agent(): return inner()\nasync def inner(): return Agent(name='F')",
        "def build_agent(model='gpt', *, flag=False, **more): return Agent(name='F')",
        "import functools\ndef _b(name): return Agent(name=name)\nbuild_agent = functools.partial(_b, 'F')",
        "def build_agent(context):\n    assert (context['model_id'], context['namespace'], context['name']) == "
        "('default/some', 'default', 'some')\n    assert context['folder'].endswith('Some')\n"
        "    return Agent(name='F')",
    ],
)
def test_factories(tmp_path: Path, source: str) -> None:
    assert published(tmp_path, source) == {"": "F"}


def test_a_factory_is_called_once_per_load(tmp_path: Path) -> None:
    source = "calls = []\ndef build_agent():\n    calls.append(1)\n    return Agent(name=f'F{len(calls)}')"
    assert published(tmp_path, source) == {"": "F1"}


@pytest.mark.parametrize(
    ("source", "code", "line", "words"),
    [
        ("agent = {'name': 'x'}", "wrong_type", 2, ("is a dict", "agent = Agent(")),
        ("agent = Agent", "wrong_type", 2, ("is the class Agent", "agent = Agent(...)")),
        ("async def f(): ...\nagent = f()\nagent.close()", "wrong_type", 3, ("never awaited",)),
        ("class Bot:\n    def run(self, task): ...\nagent = Bot()", "wrong_type", 4, ("run method", "function_tool")),
        (
            "from agents.realtime import RealtimeAgent\nagent = RealtimeAgent(name='R')",
            "wrong_type",
            3,
            ("RealtimeAgent",),
        ),
        (
            "from agents.realtime import RealtimeAgent\nvoice = RealtimeAgent(name='R')",
            "wrong_type",
            3,
            ("not a chat model",),
        ),
        ("def build_agent(): return 5", "wrong_type", 2, ("What 'build_agent' returned is a int",)),
        ("def build_agent(a, b): ...", "factory_arguments", 2, ("a, b", "def build_agent(context)")),
        ("def build_agent(*, key): ...", "factory_arguments", 2, ("keyword-only",)),
        ("def build_agent():\n    return 1 / 0", "factory_error", 3, ("ZeroDivisionError", "factory 'build_agent'")),
        ("async def build_agent():\n    raise OSError('x')", "factory_error", 3, ("OSError: x",)),
        ("import sys\ndef build_agent():\n    sys.exit()", "import_exit", 4, ("factory 'build_agent'",)),
        ("agnet = 1", "no_export", 2, ("Found: agnet", "Did you mean 'agnet'?")),
        ("x = 1", "no_export", None, ("looked for: agent, root_agent", 'agent = Agent(name="some"')),
        ("def make_agent(name): return Agent(name=name)", "no_export", 2, ("agent = make_agent(...)",)),
        ("def main():\n    helper = Agent(name='X')", "no_export", None, ("made inside a function",)),
        (
            "north = Agent(name='N')\nsouth = Agent(name='S')",
            "ambiguous_export",
            2,
            ("north, south", '__agents__ = ["north"]'),
        ),
        ("__agents__ = []", "no_export", 2, ("empty",)),
        ("__agents__ = 5", "no_export", 2, ("is a int",)),
        ("__agents__ = ['agnt']\nagent = Agent(name='A')", "no_export", 2, ("Did you mean 'agent'?",)),
        ("x = 5\n__agents__ = ['x']", "wrong_type", 2, ("'x' is a int",)),
        ("agent = Agent(name=5)", "import_error", 2, ("TypeError",)),
    ],
)
def test_what_is_unclear_is_explained(
    tmp_path: Path, source: str, code: str, line: int | None, words: tuple[str, ...]
) -> None:
    found = problem(tmp_path, source)
    assert (found.code, found.file, found.line) == (code, "Some/agent.py", line), found
    for word in words:
        assert word in f"{found.message} {found.fix}"


def test_options_of_the_file(tmp_path: Path) -> None:
    source = """agent = Agent(name='A')
__gateway__ = {"display_name": "Desk", "namespace": "labs", "timeout": 5, "max_turns": 3, "expose": False,
               "client_tools": "ignore", "tools": [], "acl": None}
"""
    built = load(tmp_path, source)
    assert built.warnings == ()
    assert built.options == AgentOptions(
        display_name="Desk", namespace="labs", timeout_s=5, max_turns=3, expose=False, client_tools="ignore"
    )


def test_an_unknown_option_is_a_warning_with_the_nearest_name(tmp_path: Path) -> None:
    [warning] = load(tmp_path, "agent = Agent(name='A')\n__gateway__ = {\n    'modle': 'x',\n}").warnings
    assert (warning.code, warning.severity, warning.line) == ("unknown_option", "warning", 4)
    assert "Did you mean 'model'?" in warning.fix


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "must be a dict"),
        ("{'model': 5}", "Expected 'str | null', got 'int'"),
        ("{'max_turns': True}", "got 'bool'"),
        ("{'max_turns': 0}", "greater than 0"),
        ("{'max_tool_hops': -1}", "0 or more"),
        ("{'max_depth': -1}", "0 or more"),
        ("{'max_model_calls': 0}", "greater than 0"),
        ("{'max_cost_usd': float('inf')}", "greater than 0"),
        ("{'timeout': -1.5}", "greater than 0"),
        ("{'namespace': 'My Labs'}", "write it as 'my-labs'"),
        ("{'client_tools': 'sometimes'}", "client_tools"),
        ("{'acl': ['a']}", "allow_agents"),
        ("{'tools': ['search']}", "gateway_tool('name')"),
    ],
)
def test_an_option_of_a_wrong_type_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    found = problem(tmp_path, f"agent = Agent(name='A')\n__gateway__ = {text}")
    assert (found.code, found.kind, found.line) == ("invalid_options", "validation", 3)
    assert words in f"{found.message} {found.fix}"
