"""AC-1 and AC-2: the README's own weather agent, dropped into a running gateway, through the official client."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.house import CHAT, FIXTURES, drop
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, StartFailed
from tests.support.waiting import in_time, wait_for

ASK = 'call get_weather {"city":"Oslo"} ;; echo'


def test_weather_agent_dropped_into_a_running_gateway_is_served_within_seconds(
    start: Callable[..., Gateway], openai_client: Callable[..., OpenAI], upstream: ObedientUpstream
) -> None:
    gateway = start(prepare=lambda home: drop("Handoff", home / "agents"))
    assert "default/weatheragent" not in gateway.model_ids()

    drop("WeatherAgent", gateway.agents)
    wait_for(lambda: "default/weatheragent" in gateway.model_ids())

    def serve_an_edit() -> float:
        saved = time.monotonic()
        name = f"Saved{round(saved * 1000)}"
        drop("WeatherAgent", gateway.agents / name)
        wait_for(lambda: f"{name}/weatheragent".lower() in gateway.model_ids())
        return time.monotonic() - saved

    in_time(serve_an_edit, 3.0)

    client = openai_client(gateway)
    text = f"{ASK} ;; first drop"
    answer = client.chat.completions.create(model="default/weatheragent", messages=[{"role": "user", "content": text}])
    assert answer.choices[0].message.content == "The weather in Oslo is sunny"
    assert upstream.find("first drop")[-1].tool_results == ["The weather in Oslo is sunny"]


def test_the_first_agent_of_an_empty_folder_is_served_too(start: Callable[..., Gateway]) -> None:
    gateway = start()
    assert "default/weatheragent" not in gateway.model_ids()
    drop("WeatherAgent", gateway.agents)
    wait_for(lambda: "default/weatheragent" in gateway.model_ids())


def test_weather_agent_is_the_readmes_own() -> None:
    source = (FIXTURES / "WeatherAgent" / "agent.py").read_text(encoding="utf-8")
    assert source == (
        "from agents import Agent, function_tool\n"
        "@function_tool\n"
        "def get_weather(city: str) -> str:\n"
        '    return f"The weather in {city} is sunny"\n'
        'agent = Agent(name="Weather Agent", instructions="Always respond with weather.", tools=[get_weather])\n'
    )


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_official_client_lists_and_chats_at_root_and_v1(
    gateway: Gateway, openai_client: Callable[..., OpenAI], prefix: str
) -> None:
    client = openai_client(gateway, prefix=prefix)
    assert "default/weatheragent" in [model.id for model in client.models.list()]
    assert client.models.retrieve("default/weatheragent").owned_by
    answer = client.chat.completions.create(model="default/weatheragent", messages=[{"role": "user", "content": ASK}])
    assert answer.choices[0].message.content == "The weather in Oslo is sunny"
    assert answer.usage is not None and answer.usage.prompt_tokens == 20


def test_official_client_streams_and_the_tool_is_really_called(client: OpenAI, upstream: ObedientUpstream) -> None:
    text = 'call get_weather {"city":"Bergen"} ;; echo ;; streamed weather'
    with client.chat.completions.create(
        model="default/weatheragent", messages=[{"role": "user", "content": text}], stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "The weather in Bergen is sunny"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert not any(c.choices[0].delta.tool_calls for c in chunks), "the agent's own tools are not the client's business"
    first, second = upstream.find("streamed weather")
    assert first.tool_results == [] and second.tool_results == ["The weather in Bergen is sunny"]
    assert second.messages[-2]["tool_calls"][0]["id"] == second.messages[-1]["tool_call_id"]
    assert first.headers["authorization"] == "Bearer sk-canary-upstream-ffffffffffffffffffffffff"


def test_key_in_x_api_key_header(gateway: Gateway) -> None:
    body = {"model": "default/weatheragent", "messages": [{"role": "user", "content": ASK}]}
    answer = gateway.post("/v1/chat/completions", body, key="", headers={"x-api-key": CHAT})
    assert answer.status == 200, answer.body
    assert answer.json()["choices"][0]["message"]["content"] == "The weather in Oslo is sunny"


@pytest.mark.parametrize("name", ["weatheragent", "weather-agent", "DEFAULT/WeatherAgent"])
def test_aliases_reach_the_same_agent(client: OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "say yes"}])
    assert answer.model == "default/weatheragent"


def test_stray_init_file_in_the_drop_in_folder_is_explained_in_one_sentence(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    def prepare(home: Path) -> None:
        drop("WeatherAgent", home / "agents")
        (home / "agents" / "__init__.py").write_text("", encoding="utf-8")

    with pytest.raises(StartFailed) as failure:
        start(prepare=prepare)
    log = str(failure.value)
    assert "__init__.py" in log
    assert "Traceback" not in log


def test_stray_init_file_in_a_checkouts_own_agents_folder_is_explained(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    """`src/agents/__init__.py` hides the SDK itself: the sentence must come before the first import of it."""
    source = tmp_path / "checkout" / "src"
    for room in ("api", "gateway", "sdk_adapter", "gateway_cli"):
        source.mkdir(parents=True, exist_ok=True)
        (source / room).symlink_to(Path(__file__).parents[2] / "src" / room)
    drop("WeatherAgent", source / "agents")
    (source / "agents" / "__init__.py").write_text("", encoding="utf-8")
    with pytest.raises(StartFailed) as failure:
        start(env={"PYTHONPATH": str(source), "GATEWAY_AGENT_DISCOVERY_PATH": str(source / "agents")})
    log = str(failure.value)
    assert "__init__.py" in log
    assert "Traceback" not in log
