"""`gateway explain`: what a name means, told from the configuration alone."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from gateway.config import Settings
from gateway_cli.errors import CliError
from gateway_cli.explaining import explain, render, render_settings
from gateway_cli.main import main
from tests.support.house import write_agent

UPSTREAMS = """\
version: 1
upstreams:
  - {name: first, base_url: "http://127.0.0.1:9/v1", models: [m, plain], timeouts: {first_byte_s: 7}}
  - {name: second, base_url: "http://127.0.0.1:9/v1", models: [n, plain], priority: 2}
aliases: {short: second/n}
"""
ROUTING = """\
version: 1
models:
  both: {strategy: weighted, targets: [{model: first/m, weight: 2}, {model: second/n}], fallbacks: [second/plain]}
  quick: {targets: [{model: first/m}, {model: second/n}], hedge: {after_s: 0.5, percentile: 95}}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "agents").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "upstreams.yaml").write_text(UPSTREAMS, encoding="utf-8")
    (tmp_path / "config" / "routing.yaml").write_text(ROUTING, encoding="utf-8")
    return Settings(agent_path=tmp_path / "agents")


@pytest.mark.parametrize(
    ("name", "kind", "candidates"),
    [
        ("both", "virtual", ["first/m", "second/n"]),
        ("first/m", "raw", ["first/m"]),
        ("short", "alias", ["second/n"]),
        ("plain", "shared", ["first/plain", "second/plain"]),
    ],
)
def test_what_a_name_means(settings: Settings, name: str, kind: str, candidates: list[str]) -> None:
    explained = explain(name, settings, ())
    assert explained.kind == kind
    assert [row["model"] for row in explained.candidates] == candidates


def test_strategy_fallbacks_tries_and_timeouts_are_shown(settings: Settings) -> None:
    text = render(explain("both", settings, ()))
    assert "both is a virtual model of routing.yaml." in text
    assert "strategy: weighted" in text
    assert "1. first/m  (weight 2; connect_s 5, first_byte_s 7," in text
    assert "fallbacks (any): second/plain" in text
    assert "tries at one target: connect 2, timeout 1" in text
    assert "a second target is asked" not in text
    hedged = render(explain("quick", settings, ()))
    assert "a second target is asked after 0.5 s, or percentile 95 of the latest first-byte times" in hedged


def test_whose_key_is_shown_to_an_upstream(settings: Settings) -> None:
    file = settings.agent_path.parent / "config" / "upstreams.yaml"
    assert "with the key" not in render(explain("both", settings, ()))
    first, rest = "name: first", "with the key that a caller sends in x-cred-first-api-key, "
    file.write_text(UPSTREAMS.replace(first, first + ", allow_server_credentials: fallback"), encoding="utf-8")
    assert rest + "else the gateway's" in render(explain("both", settings, ()))
    file.write_text(UPSTREAMS.replace(first, first + ", allow_server_credentials: never"), encoding="utf-8")
    explained = explain("first/m", settings, ())
    assert rest + "without one it is left out" in render(explained)
    assert explained.candidates[0]["lent_key_header"] == "x-cred-first-api-key"


def test_a_name_that_nobody_serves_is_said_to_be_none(settings: Settings) -> None:
    with pytest.raises(CliError, match="Nobody serves 'else'"):
        explain("else", settings, ())


def test_an_agent_is_explained_by_where_its_model_calls_go(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings.agent_path is not None
    write_agent(settings.agent_path, "Helper", "Help.", extra='__gateway__ = {"model": "both"}\n')
    assert main(["explain", "Helper", "--path", str(settings.agent_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["kind"], told["agent"]) == ("default/helper", "agent", "both")
    assert [row["model"] for row in told["candidates"]] == ["first/m", "second/n"]


def test_settings_say_where_they_come_from_and_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_API_KEY", "sk-very-secret")
    monkeypatch.setenv("GATEWAY_PORT", "8123")
    text = render_settings(Settings.from_env())
    assert "GATEWAY_PORT = 8123  (GATEWAY_PORT)" in text
    assert "GATEWAY_HOST = 127.0.0.1  (default)" in text
    assert "GATEWAY_API_KEY = ***" in text and "very-secret" not in text


def test_no_password_is_in_what_settings_say_and_no_number_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_DATABASE_URL", "postgresql://gateway:canary1@db.example/x?password=canary2")
    monkeypatch.setenv("GATEWAY_REDIS_URL", "redis://:canary3@redis.example:6379/0")
    monkeypatch.setenv("GATEWAY_BUDGET_ALERT_URL", "https://hooks.example/T0/canary4")
    monkeypatch.setenv("GATEWAY_BUDGET_ALERT_SECRET", "canary5")
    monkeypatch.setenv("GATEWAY_KEY_PEPPER", "canary6")
    monkeypatch.setenv("GATEWAY_METRICS_TOKEN", "canary7")
    monkeypatch.setenv("OPENAI_API_KEY", "canary8")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:canary9@models.example/v1")
    text = render_settings(Settings.from_env())
    assert "canary" not in text
    assert "GATEWAY_DATABASE_URL = postgresql://db.example/***  (GATEWAY_DATABASE_URL)" in text
    assert "GATEWAY_BUDGET_ALERT_SECRET = ***" in text
    assert "GATEWAY_RUN_MAX_TOKENS = 5000000  (default)" in text


def test_every_setting_that_holds_a_secret_is_marked_as_one() -> None:
    named = {item.name for item in fields(Settings) if re.search(r"api_key|_token$|secret|pepper|password", item.name)}
    assert named <= {item.name for item in fields(Settings) if item.metadata["secret"]}


def test_nothing_to_explain_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 2
    assert "Name a model" in capsys.readouterr().err
