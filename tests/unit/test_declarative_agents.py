"""`agents.yaml`: declarative agents and agents by module name, in the registry of the drop-ins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.registry.declarations import load_declarations
from tests.support.loading import Bench, Shelf, open_bench, write, write_agent

GREETER = "  - {name: greeter, instructions: You greet.}\n"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench() as opened:
        yield opened


@pytest.fixture
def shelf(bench: Bench, tmp_path: Path) -> Iterator[Shelf]:
    write(tmp_path, "agents.yaml", "version: 1\n")
    (tmp_path / "agents").mkdir()
    settings = replace(bench.settings, agent_config=tmp_path / "agents.yaml")
    with bench.catalogue((tmp_path / "agents").resolve(), settings=settings) as opened:
        yield opened


def refused(tmp_path: Path, text: str) -> str:
    path = write(tmp_path, "agents.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_declarations(Settings(agent_config=path))
    assert str(tmp_path) not in caught.value.message
    return caught.value.message


def test_defaults_apply_before_anything_is_checked(tmp_path: Path) -> None:
    text = """version: 1
defaults: {namespace: House, upstream: local, model: small}
agents:
  - name: Night Porter
    instructions: You open doors.
  - name: other
    namespace: labs
    model: large
    upstream: demo
    instructions: x
    metadata: {max_tool_hops: 0, max_completion_tokens: 7, tool_choice: none, owned_by: me, max_turns: 3,
               timeout_s: 9, max_depth: 0, max_model_calls: 4, max_tool_calls: 5, max_total_tokens: 6,
               max_cost_usd: 0.5}
"""
    (first, second), defaults, _ = load_declarations(Settings(agent_config=write(tmp_path, "agents.yaml", text)))
    assert (first.id, first.options.upstream, first.options.model, first.line) == (
        "house/night-porter",
        "local",
        "small",
        4,
    )
    assert (second.id, second.options.upstream, second.options.model) == ("labs/other", "demo", "large")
    assert (second.options.max_tool_hops, second.options.max_completion_tokens) == (0, 7)
    own = second.options
    assert (own.max_turns, own.timeout_s, own.max_depth, own.max_model_calls) == (3, 9, 0, 4)
    assert (own.max_tool_calls, own.max_total_tokens, own.max_cost_usd) == (5, 6, 0.5)
    assert (second.tool_choice, second.owned_by) == ("none", "me")
    assert (defaults.namespace, defaults.upstream, defaults.model) == ("house", "local", "small")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agents:\n  - {name: a}\n", "agents.yaml:2: agent 'a': instructions are missing"),
        ("agents:\n  - {name: a, kind: sdk}\n", "module is missing"),
        ("model_config: {weather: {temperature: 1}}\n", "'weather' is no id of an agent"),
        ("model_config: {default/weather: {temperature: 3}}\n", "temperature: Expected 'float' <= 2.0"),
        ("model_config: {default/weather: {temprature: 1}}\n", "did you mean 'temperature'"),
        ("agents:\n  - {name: a, instructions: x, module: 'm:a'}\n", "kind: sdk"),
        ("agents:\n  - {name: a, instructions: x, tools: [a b]}\n", "'a b' is no name of a tool"),
        ("agents:\n  - {name: a, kind: sdk, module: 'no.such.module:agent'}\n", "'no.such.module' is not found"),
        ("agents:\n  - {name: a, kind: sdk, module: 'nocolon'}\n", "module"),
        ("agents:\n  - {name: a, instructions: x}\n  - {name: A, instructions: y}\n", "taken by the agent at line 2"),
        ("agents:\n  - {name: a, instrctions: x}\n", "did you mean 'instructions'?"),
        ("agents:\n  - {name: '', instructions: x}\n", "name"),
        ("agents: {\n", "agents.yaml:"),
        ("version: 2\n", "version"),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text)


def test_a_declarative_agent_is_served_beside_drop_ins(shelf: Shelf, tmp_path: Path) -> None:
    text = "agents:\n  - {name: greeter, description: Greets., instructions: You greet., upstream: local}\n"
    write(tmp_path, "agents.yaml", text)
    write_agent(tmp_path / "agents", "Some")
    shelf.refresh()
    entry = shelf.entry("default/greeter")
    assert (entry.status, entry.kind, entry.source, entry.file) == ("ready", "declarative", "yaml", "agents.yaml")
    assert (entry.upstream, entry.model, entry.description) == ("local", "small", "Greets.")
    assert shelf.instructions("greeter") == "You greet."
    assert shelf.entry("default/some").source == "file"


def test_defaults_hold_for_drop_ins_that_name_nothing(shelf: Shelf, tmp_path: Path) -> None:
    write(tmp_path, "agents.yaml", "defaults: {namespace: house, upstream: local}\n")
    write_agent(tmp_path / "agents", "Plain")
    write_agent(tmp_path / "agents", "labs/Own", extra="__gateway__ = {'upstream': 'demo'}\n")
    shelf.refresh()
    assert (shelf.entry("house/plain").upstream, shelf.entry("labs/own").upstream) == ("local", "demo")
    write(tmp_path, "agents.yaml", "defaults: {upstream: demo, model: demo}\n")
    shelf.refresh(paths={tmp_path / "agents.yaml"})
    assert shelf.entry("default/plain").upstream == "demo"
    assert shelf.catalogue.registry.find("house/plain") is None


def test_only_what_changed_in_the_file_is_loaded_again(shelf: Shelf, tmp_path: Path) -> None:
    write(tmp_path, "agents.yaml", "agents:\n" + GREETER + "  - {name: b, instructions: One.}\n")
    shelf.refresh()
    before = shelf.entry("greeter").generation
    write(tmp_path, "agents.yaml", "# moved down\nagents:\n  - {name: b, instructions: Two.}\n" + GREETER)
    report = shelf.refresh()
    assert report.loaded == ("default/b",)
    assert shelf.instructions("b") == "Two."
    assert shelf.entry("greeter").generation == before
    write(tmp_path, "agents.yaml", "agents:\n" + GREETER)
    assert shelf.refresh().removed == ("default/b",)


def test_yaml_wins_over_a_drop_in_and_says_so(shelf: Shelf, tmp_path: Path) -> None:
    write_agent(tmp_path / "agents", "Greeter", "I am the file.")
    shelf.refresh()
    assert shelf.instructions("greeter") == "I am the file."
    write(tmp_path, "agents.yaml", "agents:\n" + GREETER)
    shelf.refresh()
    assert shelf.instructions("default/greeter") == "You greet."
    [rejected] = shelf.catalogue.registry.rejected
    assert rejected.diagnostics[0].code == "shadowed_by_yaml"
    assert shelf.catalogue.recent_errors()[0].code == "shadowed_by_yaml"


def test_a_broken_file_keeps_its_last_good_version(shelf: Shelf, tmp_path: Path) -> None:
    write(tmp_path, "agents.yaml", "agents:\n" + GREETER)
    shelf.refresh()
    write(tmp_path, "agents.yaml", "agents:\n  - {name: greeter\n")
    shelf.refresh()
    assert shelf.entry("greeter").status == "ready"
    row = next(row for row in shelf.catalogue.registry.list_entries() if row.name == "agents.yaml")
    assert (row.status, row.diagnostics[0].code, row.diagnostics[0].file) == ("error", "invalid_config", "agents.yaml")
    assert row.diagnostics[0].line is not None
    write(tmp_path, "agents.yaml", "agents:\n" + GREETER)
    shelf.refresh()
    assert [row.id for row in shelf.catalogue.registry.list_entries()] == ["default/greeter"]


def test_an_unknown_upstream_or_model_is_refused_with_the_fix(shelf: Shelf, tmp_path: Path) -> None:
    text = "agents:\n  - {name: a, instructions: x, upstream: locall}\n"
    text += "  - {name: b, instructions: x, upstream: local, model: big}\n"
    write(tmp_path, "agents.yaml", text)
    shelf.refresh()
    assert shelf.problem("a").code == "unknown_upstream" and "Did you mean 'local'?" in shelf.problem("a").message
    assert shelf.problem("b").code == "unknown_model" and "upstreams.yaml" in shelf.problem("b").fix


def test_an_agent_by_module_name(
    shelf: Shelf, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path_factory.mktemp("library")
    monkeypatch.syspath_prepend(library)
    write(library, "acme/__init__.py", "")
    write(library, "acme/words.py", "TEXT = 'first'\n")
    source = "from agents import Agent\nfrom .words import TEXT\nbot = Agent(name='Bot', instructions=TEXT)\n"
    write(library, "acme/bots.py", source + "def make(): return bot\n")
    exports = {"a": "bot", "b": "make", "c": "bott"}
    lines = [f"  - {{name: {name}, kind: sdk, module: 'acme.bots:{export}'}}" for name, export in exports.items()]
    write(tmp_path, "agents.yaml", "\n".join(["agents:", *lines]))
    shelf.refresh()
    entry = shelf.entry("default/a")
    assert (entry.status, entry.kind, entry.source, entry.file) == ("ready", "sdk", "yaml", "agents.yaml")
    assert shelf.instructions("a") == shelf.instructions("b") == "first"
    assert shelf.problem("c").code == "no_export" and "Did you mean 'bot'?" in shelf.problem("c").fix
    assert library / "acme/words.py" in shelf.catalogue.tracked_files()
    write(library, "acme/words.py", "TEXT = 'other'\n")
    shelf.refresh(paths={library / "acme/words.py"})
    assert shelf.instructions("a") == "other"
