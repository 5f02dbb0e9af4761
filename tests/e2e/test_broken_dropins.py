"""AC-5 and promise 7: broken and hostile drop-ins cost a diagnostic that teaches, never the gateway or a neighbour."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, drop, furnish, write_agent
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, descendants, running_gateway
from tests.support.waiting import wait_for

EXPECTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "SyntaxError": ("import", ("SyntaxError/agent.py", "syntax")),
    "MissingPackage": ("dependency", ("surely_not_installed", "MissingPackage/agent.py")),
    "NoExport": ("validation", ("agnet", "agent")),
    "WrongType": ("validation", ("dict", "agent")),
    "RaisesAtImport": ("import", ("KeyError", "RaisesAtImport/agent.py")),
    "BaseExceptionAtImport": ("import", ("KeyboardInterrupt",)),
    "SysExit": ("import", ("exit",)),
    "OsExit": ("import", ("7",)),
    "Segfault": ("import", ("SIGSEGV",)),
    "EndlessLoop": ("import", ("3 s", "EndlessLoop/agent.py")),
    "Sleeper": ("import", ("3 s",)),
    "Monkeypatcher": ("import", ("RuntimeError",)),
    "DuplicateTool": ("validation", ("look_up",)),
    "Ambiguous": ("validation", ("north", "south", "__agents__")),
    "BadFactory": ("validation", ("build_agent",)),
    "UnknownUpstream": ("validation", ("atlantis", "local")),
    "Huge": ("validation", ("512",)),
    "NotUtf8": ("import", ("NotUtf8/agent.py",)),
    "Escapes": ("security", ("Escapes",)),
    "Partial": ("import", ("Partial/agent.py",)),
    "NullBytes": ("import", ("NullBytes/agent.py",)),
    "DeniedPlain": ("security", ("subprocess", "DeniedPlain/agent.py")),
    "DeniedFrom": ("security", ("subprocess",)),
    "DeniedDynamic": ("security", ("subprocess",)),
    "DeniedHelper": ("security", ("subprocess", "DeniedHelper/inner.py")),
}
"""Folder → kind of its diagnostic, and words that its message, cause, file or fix must hold."""

STORED = [name for name in EXPECTED if (Path(__file__).parents[1] / "fixtures/dropin_agents/broken" / name).is_dir()]
LINES = {"SyntaxError": 3, "MissingPackage": 2, "RaisesAtImport": 4, "DeniedFrom": 8, "SysExit": 3, "DeniedHelper": 6}


def write_the_rest(agents: Path, outside: Path) -> None:
    """The ones that cannot be stored as files of a repository."""

    def write(name: str, content: bytes) -> None:
        (agents / name).mkdir()
        (agents / name / "agent.py").write_bytes(content)

    good = b"from agents import Agent\n\nagent = Agent(name='A', instructions='x')\n"
    write("SyntaxError", b"from agents import Agent\n\nagent = Agent(name='A' instructions='x')\n")
    write("Huge", good + b"# padding\n" * 1_000_000)
    write("NotUtf8", b"from agents import Agent\nagent = Agent(name='\xe9', instructions='\xff\xfe')\n")
    write("Partial", good[:40])
    write("NullBytes", good + b"\x00\x00\x00")
    outside.mkdir()
    (outside / "agent.py").write_bytes(good.replace(b"\n\n", b"\nopen(__import__('os').environ['TEST_MARKER'], 'a')\n"))
    (agents / "Escapes").mkdir()
    (agents / "Escapes" / "agent.py").symlink_to(outside / "agent.py")


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marker") / "executed"


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream, marker: Path) -> Iterator[Gateway]:
    """A gateway whose folder holds everything that is broken, and two healthy agents."""
    home = tmp_path_factory.mktemp("sick")
    furnish(home, upstream.url)
    for name in STORED:
        drop(f"broken/{name}", home / "agents")
    drop("broken/ThreadStarter", home / "agents")
    write_the_rest(home / "agents", home / "outside")
    drop("WeatherAgent", home / "agents")
    drop("Handoff", home / "agents")
    env = {
        "GATEWAY_AGENT_AUTO_RELOAD": "1",
        "GATEWAY_AGENT_IMPORT_TIMEOUT_S": "3",
        "GATEWAY_AGENT_DISCOVERY_DENYLIST": "subprocess",
        "TEST_MARKER": str(marker),
    }
    with running_gateway(home, env=env, key=ADMIN) as gateway:
        wait_for(lambda: len(gateway.listing()) >= len(EXPECTED) + 3, what="every drop-in was looked at")
        yield gateway


def entry_of(gateway: Gateway, name: str) -> dict[str, Any]:
    return gateway.listing()[f"default/{name.lower()}"]


def test_healthy_neighbours_are_served(sick: Gateway) -> None:
    assert {"default/weatheragent", "default/handoff"} <= sick.model_ids()
    request = {"model": "default/weatheragent", "messages": [{"role": "user", "content": "say healthy"}]}
    answer = sick.post("/v1/chat/completions", request, key=CHAT)
    assert answer.json()["choices"][0]["message"]["content"] == "healthy"
    assert sick.get("/readyz").status == 200


@pytest.mark.parametrize("name", EXPECTED)
def test_each_is_listed_with_kind_file_cause_and_fix(sick: Gateway, name: str) -> None:
    kind, words = EXPECTED[name]
    entry = entry_of(sick, name)
    assert entry["status"] == "error"
    assert entry["error"]
    metadata = entry["metadata"]
    said = json.dumps([entry["error"], metadata])
    assert metadata["kind"] == kind, said
    assert metadata["fix"].strip() and metadata["message"].strip()
    assert metadata["file"].startswith(name)
    for word in words:
        assert word.lower() in said.lower(), f"{word!r} is not in {said}"
    if name in LINES:
        assert metadata["line"] == LINES[name], said
    assert f"default/{name.lower()}" not in sick.model_ids()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_is_among_the_errors_the_log_and_the_metric(sick: Gateway, name: str) -> None:
    kind, _ = EXPECTED[name]
    errors = [e for e in sick.get("/agents/errors").json() if (e["details"].get("file") or "").startswith(name)]
    assert errors, f"{name} is not in /agents/errors"
    assert errors[0]["error_stage"] == kind
    event = "agent.dropin.blocked" if kind == "security" else "agent.dropin.failed"
    sick.logged(event, where=lambda line: name in json.dumps(line))
    assert sick.get("/metrics").json()["dropin_failures"][kind] >= 1


def test_nothing_denied_was_executed(sick: Gateway, marker: Path) -> None:
    assert not marker.exists(), marker.read_text(encoding="utf-8")


def test_nothing_of_the_server_is_told(sick: Gateway) -> None:
    for path in ("/agents", "/agents/errors"):
        text = sick.get(path).body.decode()
        assert str(sick.home) not in text
        assert "site-packages" not in text


def test_a_chat_with_a_broken_agent_says_so_without_detail(sick: Gateway) -> None:
    request = {"model": "default/raisesatimport", "messages": [{"role": "user", "content": "hi"}]}
    for streamed in (False, True):
        answer = sick.post("/v1/chat/completions", request | {"stream": streamed}, key=CHAT)
        assert answer.status in (404, 500)
        assert "KeyError" not in answer.body.decode() and ".py" not in answer.body.decode()


def test_threads_started_at_import_do_not_harm(sick: Gateway) -> None:
    entry = entry_of(sick, "ThreadStarter")
    assert entry["status"] in ("ready", "error")
    if entry["status"] == "ready":
        request = {"model": "default/threadstarter", "messages": [{"role": "user", "content": "say threads"}]}
        assert sick.post("/v1/chat/completions", request, key=CHAT).status == 200


def test_no_child_of_an_import_is_left(sick: Gateway) -> None:
    def busy() -> list[int]:
        return [pid for pid in descendants(sick.process.pid) if "EndlessLoop" in _command(pid)]

    assert not busy()
    wait_for(lambda: len(descendants(sick.process.pid)) <= 2, what="children of imports have ended")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_mending_one_while_others_stay_broken(sick: Gateway) -> None:
    write_agent(sick.agents, "SysExit", "I was mended.")
    wait_for(lambda: "default/sysexit" in sick.model_ids())
    write_agent(sick.agents, "SysExit", "I was mended.", extra="import sys\nsys.exit(3)")
    wait_for(lambda: entry_of(sick, "SysExit")["status"] == "stale")
    (sick.agents / "SysExit" / "agent.py").write_text("import sys\n\nsys.exit(3)\n", encoding="utf-8")


def test_a_hanging_import_does_not_delay_the_save_of_another(sick: Gateway, upstream: ObedientUpstream) -> None:
    write_agent(sick.agents, "Sleeper", "x", extra=f"import time\ntime.sleep({3600 + os.getpid()})")
    write_agent(sick.agents, "Quick", "I am quick.")
    wait_for(lambda: "default/quick" in sick.model_ids(), what="Quick is served")
    assert "default/sleeper" not in sick.model_ids()
