"""AC-4 and hot reload: add, change, delete, rename, helper files, YAML; a broken edit keeps the last good version."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, NARROW, drop, furnish, write_agent
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import ROOT, Gateway, running_gateway
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    """A gateway that watches its files; each test uses names of its own."""
    home = tmp_path_factory.mktemp("live")
    furnish(home, upstream.url)
    drop("WeatherAgent", home / "agents")
    with running_gateway(home, env={"GATEWAY_AGENT_AUTO_RELOAD": "1"}, key=ADMIN) as gateway:
        yield gateway


def system_prompt(gateway: Gateway, upstream: ObedientUpstream, model: str) -> str:
    """What the agent is told now, as the upstream sees it; empty while the agent is not served."""
    before = len(upstream.calls)
    request = {"model": model, "messages": [{"role": "user", "content": f"say prompt of {model}"}]}
    if gateway.post("/v1/chat/completions", request, key=CHAT).status != 200:
        return ""
    return next(call.system for call in upstream.calls[before:] if f"prompt of {model}" in json.dumps(call.body))


def test_add_change_delete(live: Gateway, upstream: ObedientUpstream) -> None:
    path = write_agent(live.agents, "Changing", "Version one.")
    wait_for(lambda: system_prompt(live, upstream, "default/changing") == "Version one.")
    write_agent(live.agents, "Changing", "Version two.")
    wait_for(lambda: system_prompt(live, upstream, "default/changing") == "Version two.")
    path.write_text(path.read_text(encoding="utf-8").replace("two", "3rd"), encoding="utf-8")
    wait_for(lambda: system_prompt(live, upstream, "default/changing") == "Version 3rd.")
    path.unlink()
    wait_for(lambda: "default/changing" not in live.model_ids())
    request = {"model": "default/changing", "messages": [{"role": "user", "content": "hi"}]}
    answer = live.post("/v1/chat/completions", request)
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_rename_of_a_folder(live: Gateway, upstream: ObedientUpstream) -> None:
    write_agent(live.agents, "OldName", "I am renamed.")
    wait_for(lambda: "default/oldname" in live.model_ids())
    (live.agents / "OldName").rename(live.agents / "NewName")
    wait_for(lambda: "default/newname" in live.model_ids() and "default/oldname" not in live.model_ids())
    assert system_prompt(live, upstream, "default/newname") == "I am renamed."


def test_same_size_edit_in_the_same_second(live: Gateway, upstream: ObedientUpstream) -> None:
    for word in ("aaa", "bbb", "ccc"):
        write_agent(live.agents, "SameSize", f"Word {word}.")
        wait_for(lambda word=word: system_prompt(live, upstream, "default/samesize") == f"Word {word}.")


def test_a_touch_without_a_change_loads_nothing(live: Gateway) -> None:
    path = write_agent(live.agents, "Touched", "Untouched.", extra="import time\nloaded = time.time_ns()")
    wait_for(lambda: "default/touched" in live.model_ids())
    generation = live.listing()["default/touched"]
    path.touch()
    live.post("/agents/refresh")
    assert live.listing()["default/touched"] == generation


def test_helper_files_inside_the_folder(live: Gateway, upstream: ObedientUpstream) -> None:
    folder = live.agents / "Helped"
    folder.mkdir()
    (folder / "prompts.py").write_text('TEXT = "First help."\n', encoding="utf-8")
    (folder / "agent.py").write_text(
        'from agents import Agent\nfrom prompts import TEXT\nagent = Agent(name="Helped", instructions=TEXT)\n',
        encoding="utf-8",
    )
    wait_for(lambda: system_prompt(live, upstream, "default/helped") == "First help.")
    (folder / "prompts.py").write_text('TEXT = "Second help."\n', encoding="utf-8")
    wait_for(lambda: system_prompt(live, upstream, "default/helped") == "Second help.")


def test_two_folders_with_helpers_of_the_same_name_do_not_meet(live: Gateway, upstream: ObedientUpstream) -> None:
    for name in ("TwinA", "TwinB"):
        folder = live.agents / name
        folder.mkdir()
        (folder / "helper.py").write_text(f'WHO = "I am {name}."\n', encoding="utf-8")
        (folder / "agent.py").write_text(
            f"import helper\nfrom agents import Agent\nagent = Agent(name={name!r}, instructions=helper.WHO)\n",
            encoding="utf-8",
        )
    wait_for(lambda: system_prompt(live, upstream, "default/twina") == "I am TwinA.")
    wait_for(lambda: system_prompt(live, upstream, "default/twinb") == "I am TwinB.")


def test_helper_files_outside_the_folder(
    start: Callable[..., Gateway], upstream: ObedientUpstream, tmp_path: Path
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "house_style.py").write_text('TEXT = "Old style."\n', encoding="utf-8")

    def prepare(home: Path) -> None:
        (home / "agents" / "Styled").mkdir()
        text = "from agents import Agent\nimport house_style\nagent = Agent(name='S', instructions=house_style.TEXT)\n"
        (home / "agents" / "Styled" / "agent.py").write_text(text, encoding="utf-8")

    gateway = start(prepare=prepare, env={"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{library}"})
    assert system_prompt(gateway, upstream, "default/styled") == "Old style."
    (library / "house_style.py").write_text('TEXT = "New style."\n', encoding="utf-8")
    wait_for(lambda: system_prompt(gateway, upstream, "default/styled") == "New style.")


def test_syntax_error_keeps_the_last_good_version_and_is_visible(live: Gateway, upstream: ObedientUpstream) -> None:
    path = write_agent(live.agents, "Fragile", "Still good.")
    wait_for(lambda: "default/fragile" in live.model_ids())
    good = path.read_text(encoding="utf-8")
    path.write_text(good + "\ndef broken(:\n", encoding="utf-8")
    entry = wait_for(lambda: [e for e in [live.listing()["default/fragile"]] if e["status"] == "stale"])[0]
    assert "default/fragile" in live.model_ids()
    assert system_prompt(live, upstream, "default/fragile") == "Still good."
    said = json.dumps(entry)
    assert "Fragile/agent.py" in said and "syntax" in said.lower()
    errors = live.get("/agents/errors").json()
    newest = next(error for error in errors if "Fragile" in json.dumps(error))
    assert newest["details"]["line"] == good.count("\n") + 2
    assert str(live.home) not in json.dumps(errors)

    path.write_text(good.replace("Still good.", "Mended."), encoding="utf-8")
    wait_for(lambda: system_prompt(live, upstream, "default/fragile") == "Mended.")
    assert live.listing()["default/fragile"]["status"] == "ready"


def test_an_edit_during_a_stream_changes_the_next_request_not_this_one(
    live: Gateway, upstream: ObedientUpstream
) -> None:
    write_agent(live.agents, "Steady", "Old text.", extra=with_tool("old_tool"), tools="told")
    wait_for(lambda: "default/steady" in live.model_ids())
    text = "[hold=1] call told ;; echo ;; edited while streaming"
    request = {"model": "default/steady", "stream": True, "messages": [{"role": "user", "content": text}]}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(live.post, "/v1/chat/completions", request)
        call = upstream.wait_for_call("edited while streaming")
        write_agent(live.agents, "Steady", "New text.", extra=with_tool("new_tool"), tools="told")
        wait_for(lambda: system_prompt(live, upstream, "default/steady") == "New text.")
        call.release()
        body = answer.result().body.decode()
    assert "old_tool" in body and "[DONE]" in body
    first, second = upstream.find("edited while streaming")
    assert first.system == second.system == "Old text."


def with_tool(name: str) -> str:
    return f"from agents import function_tool\n\n@function_tool\ndef told() -> str:\n    return {name!r}\n\n"


def test_refresh_on_request_without_a_watcher(start: Callable[..., Gateway], upstream: ObedientUpstream) -> None:
    gateway = start(
        prepare=lambda home: write_agent(home / "agents", "Quiet", "One."), env={"GATEWAY_AGENT_AUTO_RELOAD": "0"}
    )
    write_agent(gateway.agents, "Quiet", "Two.")
    write_agent(gateway.agents, "Newcomer", "New.")
    assert "default/newcomer" not in gateway.model_ids()
    listed = gateway.post("/agents/refresh")
    assert listed.status == 200
    assert {e["qualified_name"] for e in listed.json()} == {"default/quiet", "default/newcomer"}
    assert system_prompt(gateway, upstream, "default/quiet") == "Two."
    assert gateway.post("/agents/refresh").json() == gateway.get("/agents").json()


def test_yaml_agents_appear_change_and_win_over_a_drop_in(
    start: Callable[..., Gateway], upstream: ObedientUpstream
) -> None:
    def config(**entries: str) -> dict[str, Any]:
        agents = [{"name": name, "kind": "declarative", "instructions": text} for name, text in entries.items()]
        return {"version": 1, "defaults": {"upstream": "local", "model": "test-model"}, "agents": agents}

    def prepare(home: Path) -> None:
        (home / "agents.yaml").write_text(json.dumps(config(notes="I am from YAML.")), encoding="utf-8")
        write_agent(home / "agents", "Clash", "I am a file.")

    gateway = start(prepare=prepare)
    assert {i for i in gateway.model_ids() if i.startswith("default/")} == {"default/notes", "default/clash"}
    assert system_prompt(gateway, upstream, "default/notes") == "I am from YAML."
    path = gateway.home / "agents.yaml"
    path.write_text(json.dumps(config(notes="Edited YAML.", clash="YAML wins.")), encoding="utf-8")
    wait_for(lambda: system_prompt(gateway, upstream, "default/notes") == "Edited YAML.")
    wait_for(lambda: system_prompt(gateway, upstream, "default/clash") == "YAML wins.")
    assert "Clash" in json.dumps(gateway.listing()["default/clash"]) or gateway.get("/agents/errors").json()
    path.write_text("agents: [nonsense", encoding="utf-8")
    wait_for(lambda: "agents.yaml" in json.dumps(gateway.get("/agents/errors").json()))
    assert system_prompt(gateway, upstream, "default/notes") == "Edited YAML.", "a broken file never takes down"


def test_keys_and_upstreams_are_reloaded_too(start: Callable[..., Gateway]) -> None:
    gateway = start(prepare=lambda home: drop("WeatherAgent", home / "agents"))
    security = gateway.home / "security.yaml"
    good = security.read_text(encoding="utf-8")
    security.write_text(good.replace('allow_agents: ["default/weatheragent", "labs/*"]', "allow_agents: []"), "utf-8")
    wait_for(lambda: gateway.model_ids(key=NARROW) == set())
    security.write_text("api_keys: nonsense\n", encoding="utf-8")
    gateway.logged("config.reload.failed", where=lambda line: "security.yaml" in json.dumps(line))
    assert gateway.get("/v1/models", key=CHAT).status == 200, "a broken file leaves the old keys active"
    upstreams = gateway.home / "upstreams.yaml"
    text = upstreams.read_text(encoding="utf-8")
    upstreams.write_text(text.replace("models: [test-model]", "models: [test-model, second-model]"), "utf-8")
    wait_for(lambda: "local/second-model" in gateway.model_ids())


def test_hundreds_of_requests_while_a_stream_spans_many_generations(live: Gateway, upstream: ObedientUpstream) -> None:
    with ExitStack() as stack:
        write_agent(live.agents, "Spanned", "Generation 0.")
        wait_for(lambda: "default/spanned" in live.model_ids())
        text = "[hold=2] say one two three spanning"
        request = {"model": "default/spanned", "stream": True, "messages": [{"role": "user", "content": text}]}
        stream = stack.enter_context(live.stream("POST", "/v1/chat/completions", json_body=request))
        chunks = stream.chunks()
        next(chunks)
        for number in range(1, 6):
            write_agent(live.agents, "Spanned", f"Generation {number}.")
            wait_for(lambda n=number: system_prompt(live, upstream, "default/spanned") == f"Generation {n}.")
        upstream.find("three spanning")[-1].release()
        rest = list(chunks)
        assert rest[-1]["choices"][0]["finish_reason"] == "stop"
