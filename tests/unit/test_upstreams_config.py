"""`upstreams.yaml` and the environment: presets, keys, the demo, and sentences that say what to correct."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.upstreams.config import UpstreamConfig, UpstreamsConfig, load_upstreams
from gateway.upstreams.presets import PRESETS

REPOSITORY = Path(__file__).parents[2]


def load(folder: Path, content: Any, env: dict[str, str] | None = None, **settings: Any) -> UpstreamsConfig:
    path = folder / "upstreams.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_upstreams(Settings(upstream_config=path, **settings), env or {})


def one(folder: Path, env: dict[str, str] | None = None, **fields: Any) -> UpstreamConfig:
    return load(folder, {"upstreams": [{"name": "up", **fields}]}, env).upstreams[0]


def test_nothing_configured_is_the_demo(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert [(u.name, u.provider, u.models) for u in config.upstreams] == [("demo", "demo", ("demo",))]


def test_shipped_file_is_valid_and_empty() -> None:
    path = REPOSITORY / "src/config/upstreams.yaml"
    assert load_yaml(path, UpstreamsConfig).upstreams == ()
    examples = "".join(
        line.removeprefix("# ").removeprefix("#") if line.startswith("#") else line
        for line in path.read_text().split("upstreams: []\n")[1].splitlines(keepends=True)
        if not line.startswith("# What a model name")
    )
    parsed = yaml.safe_load(examples)
    assert {u["provider"] for u in parsed["upstreams"]} >= {"openai", "lmstudio", "ollama", "vllm", "openai-compatible"}


def test_shipped_examples_load(tmp_path: Path) -> None:
    text = (REPOSITORY / "src/config/upstreams.yaml").read_text().split("upstreams: []\n")[1]
    lines = [line.removeprefix("# ").removeprefix("#") for line in text.splitlines() if "What a model name" not in line]
    env = {"OPENAI_API_KEY": "sk-x", "OTHER_API_KEY": "y", "GROQ_KEY_A": "a", "GROQ_KEY_B": "b"}
    config = load(tmp_path, "\n".join(lines), env)
    assert [u.name for u in config.upstreams] == ["openai", "lmstudio", "ollama", "vllm", "groq", "other"]


def test_openai_key_adds_openai(tmp_path: Path) -> None:
    (openai,) = load(tmp_path, "", openai_api_key="sk-1").upstreams
    assert (openai.name, openai.base_url, openai.api) == ("openai", "https://api.openai.com/v1", "responses")
    assert openai.models is not None
    assert "gpt-*" in openai.models
    (elsewhere,) = load(tmp_path, "", openai_api_key="sk-1", openai_base_url="http://127.0.0.1:1/v1").upstreams
    assert (elsewhere.base_url, elsewhere.api) == ("http://127.0.0.1:1/v1", "chat")


def test_file_wins_over_the_openai_key(tmp_path: Path) -> None:
    content = {"upstreams": [{"name": "openai", "provider": "openai", "api": "chat", "api_key": "${OPENAI_API_KEY}"}]}
    (openai,) = load(tmp_path, content, openai_api_key="sk-1").upstreams
    assert (openai.api, openai.api_key) == ("chat", "sk-1")


@pytest.mark.parametrize(
    ("provider", "base_url"),
    [
        ("openai", "https://api.openai.com/v1"),
        ("anthropic", "https://api.anthropic.com/v1"),
        ("huggingface", "https://router.huggingface.co/v1"),
        ("lmstudio", "http://127.0.0.1:1234/v1"),
        ("ollama", "http://127.0.0.1:11434/v1"),
        ("vllm", "http://127.0.0.1:8000/v1"),
    ],
)
def test_presets_fill_the_address(tmp_path: Path, provider: str, base_url: str) -> None:
    assert one(tmp_path, provider=provider).base_url == base_url
    assert one(tmp_path, provider=provider, base_url="http://10.0.0.1/v1").base_url == "http://10.0.0.1/v1"


def test_order_is_by_priority_then_by_file(tmp_path: Path) -> None:
    entries = [
        {"name": name, "base_url": "http://h/v1", "priority": priority}
        for name, priority in (("c", 2), ("a", 1), ("b", 1))
    ]
    assert [u.name for u in load(tmp_path, {"upstreams": entries}).upstreams] == ["a", "b", "c"]


def test_keys_come_from_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    env = {"MY_KEY": " k-123 \n".strip() + "\n"}
    assert one(tmp_path, env, base_url="http://h/v1", api_key="${MY_KEY}").api_key == "k-123"
    assert one(tmp_path, env, base_url="http://h/v1", api_key_env="MY_KEY").api_key == "k-123"
    headers = one(tmp_path, {"T": "x"}, base_url="http://${T}/v1", headers={"x-a": "b-${T}"})
    assert (headers.base_url, headers.headers) == ("http://x/v1", {"x-a": "b-x"})
    assert not caplog.records


def test_key_in_the_file_is_warned_of_and_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = one(tmp_path, base_url="http://h/v1", api_key="sk-literal-123", headers={"x-secret": "other-secret"})
    assert config.api_key == "sk-literal-123"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "sk-literal-123" not in str(record.__dict__)
    assert "secret" not in repr(config)
    assert "sk-literal" not in repr(UpstreamsConfig(upstreams=(config,)))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"base_url": "http://h/v1", "api_key": "${NOPE}"},
            r"upstream 'up': api_key names \$\{NOPE\}, which is not set",
        ),
        ({"base_url": "http://h/v1", "api_key_env": "NOPE"}, "api_key_env names NOPE, which is not set"),
        ({"base_url": "http://h/v1", "api_key_env": "A", "api_key": "x"}, "set one of api_key, api_key_env"),
        ({}, "base_url is missing"),
        ({"base_url": "h:80/v1"}, "must start with http:// or https://"),
        ({"base_url": "ftp://h/v1"}, "must start with http:// or https://"),
        ({"base_url": "http:///v1"}, "name a host"),
        ({"base_url": "http://h:port/v1"}, "is not an address"),
        ({"base_url": "http://h:99999/v1"}, "is not an address"),
        ({"base_url": "http://me:pw@h/v1"}, "holds a user name or password"),
        ({"base_url": "http://h/v 1"}, "must start with"),
        ({"base_url": "http://h/v1", "headers": {"Host": "x"}}, "'Host' cannot be set here"),
        ({"base_url": "http://h/v1", "headers": {"x y": "x"}}, "'x y' cannot be set here"),
        ({"base_url": "http://h/v1", "headers": {"x": "a\nb"}}, "characters a header cannot carry"),
        ({"base_url": "http://h/v1", "priority": 0}, "priority"),
        ({"base_url": "http://h/v1", "timeouts": {"idle_s": -1}}, "idle_s"),
        ({"base_url": "http://h/v1", "timeouts": {"idle": 1}}, "did you mean 'idle_s'"),
        ({"base_url": "http://h/v1", "provider": "openia"}, "no provider 'openia'; did you mean 'openai'"),
        ({"base_ur": "http://h/v1"}, "did you mean 'base_url'"),
    ],
)
def test_mistake_is_named(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        one(tmp_path, **fields)
    assert "pw" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"upstreams": [{"name": "a", "provider": "vllm"}, {"name": "a", "provider": "vllm"}]},
            "two upstreams are named",
        ),
        ({"upstreams": [{"name": "a/b", "provider": "vllm"}]}, "name"),
        ({"upstreams": [{"name": "a", "provider": "vllm"}], "aliases": {"x": "b/y"}}, "one of: a"),
        ({"upstreams": [{"name": "a", "provider": "vllm"}], "aliases": {"x": "a"}}, "must point at 'upstream/model'"),
        ({"upstreams": [{"name": "local", "provider": "vllm"}], "default_upstream": "locla"}, "did you mean 'local'"),
        ({"version": 2}, "version"),
        ({"upstream": []}, "did you mean 'upstreams'"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(tmp_path, content)


def test_settings_name_the_default(tmp_path: Path) -> None:
    content = {"upstreams": [{"name": "a", "provider": "vllm"}, {"name": "b", "provider": "ollama"}]}
    config = load(tmp_path, content, default_upstream="b", default_model="m")
    assert (config.default_upstream, config.default_model) == ("b", "m")
    with pytest.raises(ConfigError, match="GATEWAY_DEFAULT_UPSTREAM"):
        load(tmp_path, content, default_upstream="c")


@pytest.mark.parametrize(
    ("fields", "discovers"),
    [
        ({"provider": "lmstudio"}, True),
        ({"provider": "ollama", "models": ["a", "b*"]}, True),
        ({"provider": "vllm", "models": ["a"]}, False),
        ({"base_url": "http://h/v1"}, True),
        ({"provider": "openai", "api_key": "sk-0"}, False),
        ({"provider": "openai", "models": ["gpt-*"]}, True),
        ({"provider": "groq"}, False),
        ({"provider": "groq", "discover": True}, True),
        ({"provider": "lmstudio", "discover": False}, False),
        ({"provider": "demo", "discover": True}, False),
    ],
)
def test_who_lists_its_own_models(tmp_path: Path, fields: dict[str, Any], discovers: bool) -> None:
    (found,) = load(tmp_path, {"upstreams": [{"name": "up", **fields}]}).upstreams
    assert found.discover is discovers


def test_every_provider_without_an_address_says_what_to_write(tmp_path: Path) -> None:
    for provider, preset in PRESETS.items():
        entry = {"name": "up", "provider": provider}
        if preset.base_url is not None or provider == "demo":
            assert load(tmp_path, {"upstreams": [entry]}).upstreams[0].base_url == preset.base_url
        else:
            with pytest.raises(ConfigError, match="base_url is missing; write "):
                load(tmp_path, {"upstreams": [entry]})


def test_several_keys_and_a_dated_api(tmp_path: Path) -> None:
    entry = {
        "name": "up",
        "provider": "azure",
        "base_url": "https://r.openai.azure.com/openai/v1",
        "api_keys": ["${A}", "${B}", "${A}"],
        "api_version": "2024-10-21",
    }
    (found,) = load(tmp_path, {"upstreams": [entry]}, {"A": "key-a", "B": "key-b"}).upstreams
    assert found.api_keys == ("key-a", "key-b")
    assert found.base_url == "https://r.openai.azure.com/openai/v1?api-version=2024-10-21"
    assert "key-a" not in repr(found)
