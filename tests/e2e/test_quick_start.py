"""The documented first steps, from a clean copy of the checkout: no key, no server, no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.house import FIXTURES
from tests.support.server import ROOT, UVICORN, Gateway, running_gateway
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a test may write into `src/agents`."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", ".gateway"))
    return folder


@pytest.fixture(scope="module")
def fresh(checkout: Path) -> Iterator[Gateway]:
    """`PYTHONPATH=src uvicorn api.main:app`, as the README writes it, started in the checkout."""
    home = checkout / "home"
    env = {
        "PYTHONPATH": "src",
        "GATEWAY_AGENT_DISCOVERY_PATH": "",
        "GATEWAY_STATE_DIR": "",
        "GATEWAY_AGENT_AUTO_RELOAD": "1",
    }
    with running_gateway(home, env=env, key="dev-secret", cwd=checkout, command=UVICORN) as gateway:
        gateway.agents = checkout / "src" / "agents"
        yield gateway


def test_the_documented_curl_lists_models(fresh: Gateway) -> None:
    answer = fresh.get("/v1/models", key="", headers={"x-api-key": "dev-secret"})
    assert answer.status == 200
    assert "default/hello" in {model["id"] for model in answer.json()["data"]}


def test_the_weather_agent_of_the_readme_answers_with_its_tool_and_no_model_configured(fresh: Gateway) -> None:
    shutil.copytree(FIXTURES / "WeatherAgent", fresh.agents / "WeatherAgent")
    wait_for(lambda: "default/weatheragent" in fresh.model_ids())
    with OpenAI(base_url=f"{fresh.url}/v1", api_key="dev-secret", max_retries=0) as client:
        question = [{"role": "user", "content": "What is the weather in Paris?"}]
        answer = client.chat.completions.create(model="default/weatheragent", messages=question)  # type: ignore[arg-type]
        assert "The weather in Paris is sunny" in (answer.choices[0].message.content or "")
        with client.chat.completions.create(
            model="default/weatheragent",
            messages=question,  # type: ignore[arg-type]
            stream=True,
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "The weather in Paris is sunny" in text
    assert fresh.get("/metrics").json()["tool_invocations"] >= 2


def test_gateway_dev_serves_a_folder_from_anywhere_and_says_how_to_call_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(FIXTURES / "WeatherAgent", home / "agents" / "WeatherAgent")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = ("-m", "gateway_cli", "dev", str(home / "agents"), "--port")
    with running_gateway(home, command=command, cwd=elsewhere, key="dev-secret") as gateway:
        assert "default/weatheragent" in gateway.model_ids()
        wait_for(lambda: "curl" in gateway.log_text(), what="the banner is printed")
        banner = gateway.log_text()
        assert "default/weatheragent" in banner and "dev-secret" in banner and "OpenAI" in banner
        shutil.copytree(FIXTURES / "Handoff", gateway.agents / "Handoff")
        wait_for(lambda: "default/handoff" in gateway.model_ids(), what="gateway dev watches its folder")
    assert not list(elsewhere.iterdir()), "nothing is written where the command was started"


def test_gateway_dev_that_is_stopped_while_it_loads_says_nothing_of_its_agents(tmp_path: Path) -> None:
    agent = tmp_path / "agents" / "Slow" / "agent.py"
    agent.parent.mkdir(parents=True)
    agent.write_text("import time\ntime.sleep(600)\n")
    command = ("-m", "gateway_cli", "dev", "--port")
    env = {"GATEWAY_AGENT_IMPORT_TIMEOUT_S": "600"}
    with running_gateway(tmp_path, env=env, command=command, key="dev-secret", ready="/health") as gateway:
        pass
    assert "No agents" not in gateway.log_text() and "answers at" not in gateway.log_text()


def test_an_openai_key_in_the_environment_never_reaches_an_agent(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "agents" / "Nosy").mkdir(parents=True)
    (home / "agents" / "Nosy" / "agent.py").write_text(
        "import os\nfrom agents import Agent, function_tool\n\n@function_tool\ndef environment() -> str:\n"
        '    """All of it."""\n    import json\n    return json.dumps(dict(os.environ))\n\n'
        "agent = Agent(name='Nosy', instructions=os.environ.get('OPENAI_API_KEY', 'no key at all'), "
        "tools=[environment])\n",
        encoding="utf-8",
    )
    (home / "upstreams.yaml").write_text(
        json.dumps({"version": 1, "upstreams": [{"name": "demo", "provider": "demo"}]}), encoding="utf-8"
    )
    env = {"OPENAI_API_KEY": "sk-canary-0123456789abcdef0123"}
    with running_gateway(home, env=env, key="dev-secret") as gateway:
        body = {
            "model": "default/nosy",
            "tool_choice": "required",
            "messages": [{"role": "user", "content": "show the environment"}],
        }
        answer = gateway.post("/v1/chat/completions", body)
        assert "canary" not in answer.body.decode()
        assert "canary" not in gateway.log_text()
