"""What the operator says of models: settings of a model name in `routing.yaml`, models of agents in `agents.yaml`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Settings
from gateway_cli.explaining import explain, render
from gateway_cli.offline import inspect_folder
from tests.support.house import ADMIN, CHAT, NARROW
from tests.support.loading import write
from tests.support.scripted_answers import Answer, Call
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

UPSTREAMS = """\
version: 1
upstreams:
  - {{name: first, base_url: "{first}", models: [m, plain], default_model: m}}
  - {{name: second, base_url: "{second}", models: [n], default_model: n, max_tokens_field: max_completion_tokens}}
  - {{name: third, base_url: "{first}", models: [r], default_model: r, api: responses}}
"""
SMALL = "sk-test-small-canary-gggggggggggggggggggggggggg"
SETTINGS = {
    "temperature": 0.1,
    "max_tokens": 77,
    "top_p": 0.5,
    "frequency_penalty": 0.25,
    "presence_penalty": -0.5,
}
ROUTING = f"""\
version: 1
models:
  category:summaries: {{targets: [{{model: first/m}}, {{model: second/n}}], settings: {SETTINGS}}}
"""
MODELS = """\
version: 1
defaults: {model: first/plain}
agents:
  - {name: declared, instructions: Help.}
  - {name: listed, instructions: Help., model: third/r}
  - {name: mixed, instructions: Help., model: first/m}
model_config:
  default/declared: {temperature: 0.3}
  default/author: {model: first/m, temperature: 0.2, max_tokens: 50, fallbacks: [second/n]}
  default/desk-clerk: {upstream: second, model: n, top_p: 0.4}
  default/listed: {presence_penalty: 1, temperature: 0.5}
  default/mixed: {fallbacks: [third/r]}
  default/own: {fallbacks: [first/m]}
"""
OWN = """\
from agents import Agent, OpenAIChatCompletionsModel
from openai import AsyncOpenAI

agent = Agent(name="Own", model=OpenAIChatCompletionsModel("x", AsyncOpenAI(api_key="x")))
"""
AUTHOR = """\
from agents import Agent, ModelSettings

agent = Agent(name="Author", model="first/plain", model_settings=ModelSettings(temperature=0.9, top_p=0.8))
"""
CATEGORY = AUTHOR.replace("first/plain", "category:summaries").replace("Author", "Category")
DESK = """\
from agents import Agent, Runner, function_tool

clerk = Agent(name="Clerk", instructions="You are the clerk.")


@function_tool
async def ask_the_clerk() -> str:
    return (await Runner.run(clerk, "Hello")).final_output


agent = Agent(name="Desk", instructions="You are the desk.", handoffs=[clerk], tools=[ask_the_clerk])
__agents__ = [agent, clerk]
__gateway__ = {"upstream": "first"}
"""


class House:
    def __init__(self, home: Path, gateway: Gateway, first: ScriptedUpstream, second: ScriptedUpstream) -> None:
        self.home, self.gateway, self.first, self.second = home, gateway, first, second

    def ask(self, model: str, *, path: str = "/v1/chat/completions", key: str = CHAT, **body: Any) -> Any:
        body.setdefault("messages" if "chat" in path else "prompt", [{"role": "user", "content": "Hello"}])
        return self.gateway.post(path, {"model": model, **body}, key=key)

    def last(self, upstream: ScriptedUpstream) -> dict[str, Any]:
        """The body of the latest call; what was asked before is forgotten."""
        calls = [request.json for request in upstream.requests if request.method == "POST"]
        upstream.requests.clear()
        return calls[-1]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("models")
    with ScriptedUpstream() as first, ScriptedUpstream() as second:
        write(home, "upstreams.yaml", UPSTREAMS.format(first=first.base_url, second=second.base_url))
        write(home, "routing.yaml", ROUTING)
        write(home, "agents.yaml", MODELS)
        rows = ((ADMIN, "[chat, admin]", "*"), (CHAT, "[chat]", "*"), (NARROW, "[chat]", "default/*"))
        keys = "".join(
            f"  - {{id: k{number}, hashed_key: {hashlib.sha256(key.encode()).hexdigest()}, scopes: {scopes}, "
            f"allow_agents: ['{allowed}']}}\n"
            for number, (key, scopes, allowed) in enumerate(rows)
        )
        keys += (
            f"  - {{id: small, hashed_key: {hashlib.sha256(SMALL.encode()).hexdigest()}, allow_agents: ['*'], "
            "limits: {tokens_per_minute: 70}}\n"
        )
        write(home, "security.yaml", f"version: 1\napi_keys:\n{keys}")
        for name, text in (("Author", AUTHOR), ("Category", CATEGORY), ("Desk", DESK), ("Own", OWN)):
            write(home / "agents" / name, "agent.py", text)
        env = {"GATEWAY_AGENT_AUTO_RELOAD": "1"}
        with running_gateway(home, env=env, key=ADMIN) as gateway:
            wait_for(lambda: len(gateway.listing()) == 8, what="the agents are there")
            yield House(home, gateway, first, second)


@pytest.fixture
def house(running: House) -> House:
    for upstream in (running.first, running.second):
        upstream.clear()
        upstream.requests.clear()
    return running


def said(body: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model call that stand in it."""
    return {name: body[name] for name in (*SETTINGS, "max_completion_tokens") if name in body}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_category_has_settings_where_the_request_says_nothing(house: House, streamed: bool) -> None:
    assert house.ask("category:summaries", stream=streamed).status == 200
    assert said(house.last(house.first)) == SETTINGS
    assert house.ask("category:summaries", stream=streamed, temperature=0, max_completion_tokens=5).status == 200
    own = {**SETTINGS, "temperature": 0, "max_completion_tokens": 5}
    del own["max_tokens"]
    assert said(house.last(house.first)) == own


def test_a_category_is_for_chat_and_completions_and_for_keys_that_reach_it(house: House) -> None:
    house.ask("category:summaries", path="/v1/completions", prompt="x", top_p=None)
    assert said(house.last(house.first)) == SETTINGS
    house.ask("first/m")
    assert said(house.last(house.first)) == {}
    refused = house.ask("category:summaries", key=NARROW)
    assert refused.status in (403, 404) and not house.first.requests


def test_the_limit_of_tokens_is_what_a_call_promises_to_the_keys_own_limits(house: House) -> None:
    # 77 tokens of an answer never fit into 70 a minute; a call that says nothing is only estimated.
    refused = house.ask("category:summaries", key=SMALL)
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded"), refused.body
    assert house.ask("category:summaries", key=SMALL, max_tokens=9).status == 200


def test_whoever_answers_is_given_the_settings_of_the_name_that_was_asked_for(house: House) -> None:
    house.first.enqueue(fault("html"))
    answer = house.ask("category:summaries")
    assert (answer.status, answer.headers["x-gateway-upstream"]) == (200, "second")
    given = said(house.last(house.second))
    assert given.pop("max_completion_tokens") == 77
    assert given == {name: value for name, value in SETTINGS.items() if name != "max_tokens"}


def test_an_agent_on_a_category_keeps_what_its_author_wrote(house: House) -> None:
    assert house.ask("category").status == 200
    assert said(house.last(house.first)) == {**SETTINGS, "temperature": 0.9, "top_p": 0.8}


def test_the_operators_word_counts_before_the_authors_and_the_requests_before_both(house: House) -> None:
    assert house.ask("author").status == 200
    call = house.last(house.first)
    assert call["model"] == "m"
    assert said(call) == {"temperature": 0.2, "top_p": 0.8, "max_tokens": 50}
    assert house.ask("author", temperature=1, max_tokens=500).status == 200
    # Of limits of tokens the smallest holds.
    assert said(house.last(house.first)) == {"temperature": 1, "top_p": 0.8, "max_tokens": 50}
    assert house.ask("declared").status == 200
    call = house.last(house.first)
    assert (call["model"], said(call)) == ("plain", {"temperature": 0.3})


@pytest.mark.parametrize("streamed", [False, True])
def test_the_fallback_answers_when_the_first_model_fails(house: House, streamed: bool) -> None:
    house.first.enqueue(fault("html"))
    house.second.enqueue(Answer(text="From the fallback."))
    answer = house.ask("author", stream=streamed)
    assert (answer.status, answer.headers["x-gateway-upstream"]) == (200, "second")
    assert b"fallback" in answer.body
    call = house.last(house.second)
    assert (call["model"], call["temperature"]) == ("n", 0.2)
    # Who chooses an upstream wants that one and no other.
    house.first.enqueue(fault("html"))
    pinned = house.gateway.post(
        "/v1/chat/completions",
        {"model": "author", "messages": [{"role": "user", "content": "x"}]},
        headers={"x-gateway-upstream": "first"},
    )
    assert pinned.status == 502, pinned.body
    assert not house.second.requests


def test_an_agent_has_its_model_wherever_it_runs(house: House) -> None:
    house.first.enqueue(Answer(calls=[Call("transfer_to_clerk")]))
    assert house.ask("desk").status == 200
    call = house.last(house.second)
    assert (call["model"], call["top_p"], call["messages"][0]["content"]) == ("n", 0.4, "You are the clerk.")
    house.first.requests.clear()
    house.first.enqueue(Answer(calls=[Call("ask_the_clerk")]), Answer(text="Done."))
    assert house.ask("desk").status == 200
    call = house.last(house.second)
    assert (call["model"], call["top_p"], call["messages"][0]["content"]) == ("n", 0.4, "You are the clerk.")
    assert "top_p" not in house.last(house.first)


def test_what_cannot_be_honoured_is_said(house: House) -> None:
    listing = house.gateway.listing()

    def told(name: str) -> tuple[str, dict[str, Any]]:
        return listing[name]["status"], listing[name]["metadata"]["diagnostics"][0]

    status, found = told("default/listed")
    assert (status, found["code"], found["severity"]) == ("ready", "setting_unsupported", "warning")
    assert "speaks the Responses API, which has no presence_penalty." in found["message"]
    status, found = told("default/mixed")
    assert (status, found["code"], found["file"]) == ("error", "unknown_model", "agents.yaml")
    assert "'third/r' cannot stand in for 'first/m': its upstream does not speak the same API" in found["message"]
    status, found = told("default/own")
    assert (status, found["code"], found["file"]) == ("error", "own_model", "agents.yaml")


def test_it_is_shown_to_admins_and_explained(house: House) -> None:
    author = house.gateway.listing()["default/author"]
    assert author["metadata"]["model_config"] == {
        "model": "first/m",
        "temperature": 0.2,
        "max_tokens": 50,
        "fallbacks": ["second/n"],
    }
    assert (author["upstream"], author["model"]) == ("first", "m")
    settings = Settings(
        agent_path=house.home / "agents",
        agent_config=house.home / "agents.yaml",
        upstream_config=house.home / "upstreams.yaml",
        routing_config=house.home / "routing.yaml",
        security_config=house.home / "security.yaml",
        state_dir=house.home / "other-state",
    )
    agents = inspect_folder(settings)
    text = render(explain("author", settings, agents))
    assert "its model calls go to: first/m" in text
    assert "fallbacks (any): second/n" in text
    assert "settings of the operator: temperature 0.2, max_tokens 50" in text
    assert "settings of the operator: temperature 0.1, max_tokens 77" in render(
        explain("category:summaries", settings, agents)
    )


def test_a_mistake_is_said_with_its_file_and_mended_while_it_runs(house: House) -> None:
    def generation() -> int:
        return int(house.gateway.listing()["default/category"]["metadata"]["generation"])

    before = generation()
    wrong = MODELS.replace("model: first/m, ", "model: 'category:letters', ").replace("clerk:", "clark:")
    try:
        write(house.home, "agents.yaml", wrong)
        house.gateway.logged("agent.config.failed", code="unknown_agent")
        (failed,) = house.gateway.logged("agent.dropin.failed", code="unknown_model", agent_id="default/author")
        assert "agents.yaml: model_config of 'default/author'" in failed["message"]
        assert "'category:letters' is not served" in failed["message"] and "routing.yaml" in failed["message"]
        wait_for(
            lambda: house.gateway.listing()["default/author"]["status"] == "stale", what="the agent is shown as stale"
        )
        listing = house.gateway.listing()
        assert "Did you mean 'default/desk-clerk'?" in listing["default/agents.yaml"]["error"]
        # Nothing stands in for what is not configured: the last good version goes on.
        assert house.ask("author").status == 200
        assert house.last(house.first)["model"] == "m"
        unknown = house.ask("category:letters")
        assert unknown.status == 404 and "'category:letters' does not exist" in unknown.error["message"]
        write(house.home, "agents.yaml", MODELS.replace("temperature: 0.2", "temperature: 0.6"))
        wait_for(
            lambda: house.gateway.listing()["default/author"]["metadata"]["model_config"]["temperature"] == 0.6,
            what="the new temperature is there",
        )
        wait_for(lambda: "default/agents.yaml" not in house.gateway.listing(), what="the complaint is gone")
        assert house.ask("author").status == 200
        assert said(house.last(house.first))["temperature"] == 0.6
        # Whom the change is not for was not loaded again.
        assert generation() == before
    finally:
        write(house.home, "agents.yaml", MODELS)
