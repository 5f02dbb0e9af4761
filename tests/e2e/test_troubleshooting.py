"""Every row of the README's troubleshooting table: the symptom is provoked, and the documented words are seen."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gateway_cli.main import main
from tests.e2e.conftest import GatewayFactory
from tests.support.house import CHAT, NARROW, drop, write_agent
from tests.support.server import Gateway

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "Troubleshooting.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOLS = "version: 1\ntools:\n  - {name: outside, provider: local, module: 'os:getcwd'}\n"


def documented(*words: str) -> None:
    """Both pages lead from the symptom to its cure by these words."""
    table = README.partition("## Troubleshooting")[2].partition("\n## ")[0]
    for word in words:
        assert word in GUIDE, f"the guide does not say {word}"
        assert word in table, f"the README's table does not say {word}"


@pytest.fixture
def house(start: GatewayFactory) -> Gateway:
    """One gateway with everything that goes wrong."""

    def prepare(home: Path) -> None:
        (home / "tools.yaml").write_text(TOOLS, encoding="utf-8")
        security = (home / "security.yaml").read_text(encoding="utf-8")
        security = security.replace("default:\n", "default:\n  dropin_module_denylist: [subprocess]\n")
        security = security.replace("  - id: chat\n", '  - id: chat\n    allow_tools: ["*"]\n')
        security = security.replace("  - id: narrow\n", "  - id: narrow\n    rate_limit: {per_minute: 2}\n")
        (home / "security.yaml").write_text(security, encoding="utf-8")
        drop("WeatherAgent", home / "agents")
        drop("ToolTrouble", home / "agents")
        shutil.copytree(home / "agents" / "WeatherAgent", home / "agents" / "Nameless")
        (home / "agents" / "Nameless" / "agent.py").write_text("x = 1\n", encoding="utf-8")
        write_agent(home / "agents", "Denied", "You are denied.", extra="import subprocess\n")

    return start(prepare=prepare, env={"GATEWAY_TOOL_CONFIG": "tools.yaml"})


def ask(gateway: Gateway, model: str, text: str, *, key: str = CHAT, stream: bool = False) -> tuple[int, str]:
    answer = gateway.post(
        "/v1/chat/completions",
        {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream},
        key=key,
    )
    return answer.status, answer.body.decode()


def test_the_rows_that_a_running_gateway_shows(house: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    """One start for all: an agent that is missing, a tool that is denied, streams that end early, a limit."""
    agent_is_missing(house, capsys)
    tool_is_denied(house)
    stream_stops(house)
    limit_is_reached(house)


def agent_is_missing(house: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert not {"default/denied", "default/nameless"} & house.model_ids()
    (blocked,) = house.logged("agent.dropin.blocked")
    assert "subprocess" in blocked["message"]
    capsys.readouterr()
    assert main(["validate", str(house.agents / "Nameless"), "--json"]) == 1
    told = capsys.readouterr().out
    assert "No agent in the file" in told
    documented("agent.dropin.blocked", "gateway validate")
    assert "No agent in the file" in GUIDE


def tool_is_denied(house: Gateway) -> None:
    refused = house.post("/tools/outside/invoke", {"arguments": {}}, key=CHAT)
    assert (refused.status, refused.error["code"]) == (403, "tool_denied")
    assert "local_tools_allowlist" in refused.error["message"]
    documented("tool_denied", "local_tools_allowlist")


def stream_stops(house: Gateway) -> None:
    status, body = ask(house, "default/tooltrouble", "call hard ;; say never", stream=True)
    assert status == 200 or json.loads(body)["error"]["code"] == "agent_error"
    assert "agent_error" in body
    assert "[DONE]" not in body
    house.logged("sdk_agent.stream.failure")
    documented("sdk_agent.stream.failure")


def limit_is_reached(house: Gateway) -> None:
    for _ in range(2):
        assert ask(house, "default/weatheragent", "say hi", key=NARROW)[0] == 200
    status, body = ask(house, "default/weatheragent", "say hi", key=NARROW)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (429, "rate_limit_exceeded")
    assert "may send 2 a minute" in error["message"]
    documented("rate_limit_exceeded", "rate_limit.per_minute")


def test_the_sdk_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier implementation showed as `PermissionError` on import: here the doctor says what to install."""
    real = importlib.metadata.distribution

    def without_sdk(name: str) -> importlib.metadata.Distribution:
        if name == "openai-agents":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("gateway_cli.doctor.distribution", without_sdk)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^FAIL +openai-agents: openai-agents is not installed; run pip install -r", told, re.MULTILINE)
    documented("openai-agents is not installed", "gateway doctor")
