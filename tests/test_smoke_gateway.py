"""The promise of the README, from end to end: `gateway dev`, a file dropped in, the official client, a tool called.

No key, no model, no network: the embedded demo model answers, over HTTP, through everything a real one would pass.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import NotFoundError, OpenAI

from tests.support.server import Gateway, free_port, running_gateway
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[1]
DEV = ("-m", "gateway_cli", "dev", "--port")
QUESTION = "What is the weather in Paris?"


def weather_agent() -> str:
    """The agent of the README's first screen, as it is printed there."""
    found = re.search(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("smoke")
    folder = home / "agents" / "Hello"
    folder.mkdir(parents=True)
    sample = ROOT / "src" / "agents" / "Hello" / "agent.py"
    (folder / "agent.py").write_text(sample.read_text(encoding="utf-8"), encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def gateway(home: Path) -> Iterator[Gateway]:
    with running_gateway(home, command=DEV, key="dev-secret", env={"PYTHONUNBUFFERED": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def weather(gateway: Gateway) -> str:
    """The README's agent, saved into the running gateway's folder."""
    folder = gateway.agents / "WeatherAgent"
    folder.mkdir()
    (folder / "agent.py").write_text(weather_agent(), encoding="utf-8")
    wait_for(lambda: "default/weatheragent" in gateway.model_ids(), what="the saved agent is a model")
    return "default/weatheragent"


@pytest.fixture(params=["/v1", ""], ids=["v1", "bare root"])
def client(gateway: Gateway, request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway.url + request.param, api_key="dev-secret", max_retries=0, timeout=60) as client:
        yield client


def test_a_saved_file_is_a_model(client: OpenAI, weather: str) -> None:
    assert {"default/hello", weather} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(weather).id == weather


def test_it_answers_and_its_tool_is_really_called(client: OpenAI, gateway: Gateway, weather: str) -> None:
    before = tool_calls(gateway)
    answer = client.chat.completions.create(model=weather, messages=[{"role": "user", "content": QUESTION}])
    assert answer.model == weather
    assert answer.choices[0].finish_reason == "stop"
    assert "The weather in Paris is sunny" in str(answer.choices[0].message.content)
    assert answer.usage is not None
    assert answer.usage.total_tokens > 0
    assert tool_calls(gateway) == before + 1


def test_the_readme_prints_the_answer_that_comes(gateway: Gateway, weather: str) -> None:
    """Its program is run as it stands, at this gateway's address."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    answer = re.search(r"```text\n(.*?)```", readme, re.DOTALL)
    assert program is not None
    assert answer is not None
    source = program.group(1).replace("http://127.0.0.1:8000", gateway.url)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer.group(1)


def test_it_streams(client: OpenAI, weather: str) -> None:
    stream = client.chat.completions.create(
        model=weather,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "The weather in Paris is sunny" in text
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None


def test_an_unknown_model_is_404_with_the_nearest_name(client: OpenAI, weather: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="default/weathragent", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
    assert weather in str(caught.value)


def test_the_banner_s_curl_and_program_work_when_pasted(gateway: Gateway) -> None:
    """What is printed at start is run as it stands."""
    wait_for(lambda: "Python (pip install openai)" in gateway.log_text(), what="the banner is printed")
    banner = gateway.log_text()
    assert "default/hello  Greets" in banner
    assert "Key: dev-secret" in banner

    found = re.search(r"^  (curl .*?\}')$", banner, re.DOTALL | re.MULTILINE)
    assert found is not None
    words = shlex.split(found.group(1).replace("\\\n", " "))
    url, body = words[1], words[words.index("-d") + 1]
    headers = dict(words[at + 1].split(": ") for at, word in enumerate(words) if word == "-H")
    assert headers.pop("Content-Type") == "application/json"
    answer = gateway.post(url.removeprefix(gateway.url), json.loads(body), headers=headers, key="")
    assert answer.status == 200, answer.body
    assert "Bonjour from Paris!" in answer.json()["choices"][0]["message"]["content"]

    program = re.search(r"Python \(pip install openai\)\n(.*?)\n\n", banner, re.DOTALL)
    assert program is not None
    source = "\n".join(line.removeprefix("  ") for line in program.group(1).splitlines())
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Bonjour from Paris!" in done.stdout


def test_health_needs_no_key_and_the_models_need_one(gateway: Gateway) -> None:
    assert gateway.get("/health", key="").status == 200
    refused = gateway.get("/v1/models", key="wrong")
    assert refused.status == 401
    assert refused.error["code"] == "invalid_api_key"


def test_list_finds_the_running_gateway(gateway: Gateway, weather: str) -> None:
    """By its state file: no address is given."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway_cli", "list"],
        env={
            "PYTHONPATH": str(ROOT / "src"),
            "GATEWAY_STATE_DIR": str(gateway.home / "state"),
            "GATEWAY_AGENT_DISCOVERY_PATH": str(gateway.agents),
        },
        cwd=gateway.home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"Served at {gateway.url}:" in done.stdout
    assert weather in done.stdout


def test_a_second_gateway_on_the_port_is_refused_in_one_sentence(gateway: Gateway, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway_cli", "dev", str(gateway.agents), "--port", str(gateway.port)],
        env={"PYTHONPATH": str(ROOT / "src"), "GATEWAY_STATE_DIR": str(home / "state")},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"gateway: Port {gateway.port} on 127.0.0.1 is in use by the gateway with pid {gateway.process.pid}; "
        "stop that, or choose another with --port.\n"
    )


def test_a_stray_init_file_is_one_sentence_at_start(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "gateway_cli", "dev", "agents", "--port", str(free_port())],
        env={"PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("gateway: agents/__init__.py makes the drop-in folder a Python package")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_validate_says_what_is_wrong_and_exits_with_1(tmp_path: Path) -> None:
    for name, source in {"Good": weather_agent(), "Bad": "from agents import Agent\nagent = Agnet(name='x')\n"}.items():
        (tmp_path / "agents" / name).mkdir(parents=True)
        (tmp_path / "agents" / name / "agent.py").write_text(source, encoding="utf-8")

    def validate(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gateway_cli", "validate", *words],
            env={"PYTHONPATH": str(ROOT / "src")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    both = validate("agents")
    assert both.returncode == 1, both.stderr
    assert "ok     default/good  Good/agent.py" in both.stdout
    assert "error: Bad/agent.py:2:" in both.stdout
    assert "NameError" in both.stdout
    assert both.stdout.endswith("2 agents, 1 broken.\n")

    one = validate("agents/Good", "--json")
    assert one.returncode == 0, one.stdout + one.stderr
    found = json.loads(one.stdout)
    assert found["ok"] is True
    assert [(agent["name"], agent["tools"]) for agent in found["agents"]] == [("default/good", ["get_weather"])]


def tool_calls(gateway: Gateway) -> int:
    count: int = gateway.get("/metrics").json()["tool_invocations"]
    return count
