"""Settings come from the environment, and every mistake names the variable and what it accepts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("GATEWAY_ENV", "prod", "development or production"),
        ("GATEWAY_PORT", "eighty", "not a number"),
        ("GATEWAY_RUN_TIMEOUT_S", "-1", "greater than 0"),
        ("GATEWAY_AGENT_AUTO_RELOAD", "maybe", "use 1 or 0"),
        ("GATEWAY_LOG_LEVEL", "loud", "debug, info, warning or error"),
        ("GATEWAY_LOG_FORMAT", "xml", "json or text"),
        ("GATEWAY_PUBLIC_URL", "gateway.example.com", "is not an address"),
        ("GATEWAY_PUBLIC_URL", "https://[::1", "is not an address"),
        ("GATEWAY_END_USER_HEADER", "end user", "is not the name of a header"),
        ("GATEWAY_CONTEXT_HEADERS", "x-a,x b", "is not the name of a header"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({name: value})
    assert name in caught.value.message
    assert says in caught.value.message


def test_every_promised_setting_has_its_variable() -> None:
    settings = Settings.from_env(
        {
            "GATEWAY_HOST": "0.0.0.0",
            "GATEWAY_PORT": "9000",
            "GATEWAY_LOG_LEVEL": "debug",
            "GATEWAY_LOG_FORMAT": "text",
            "GATEWAY_CORS_ORIGINS": "https://a.example, https://b.example",
            "GATEWAY_SECURITY_CONFIG": "security.yaml",
            "GATEWAY_AGENT_CONFIG": "agents.yaml",
        }
    )
    assert (settings.host, settings.port) == ("0.0.0.0", 9000)
    assert (settings.log_level, settings.log_format) == ("debug", "text")
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.security_config, settings.agent_config) == (Path("security.yaml"), Path("agents.yaml"))


def test_values_are_typed_and_blank_means_default() -> None:
    settings = Settings.from_env(
        {
            "GATEWAY_PORT": "9000",
            "GATEWAY_AGENT_WATCH": "true",
            "GATEWAY_AGENT_DISCOVERY_EXTRA_PATHS": "a, b,,",
            "GATEWAY_AGENT_DISCOVERY_PATH": "x/y",
            "GATEWAY_DEFAULT_MODEL": "  ",
        }
    )
    assert (settings.port, settings.agent_auto_reload, settings.agent_extra_paths) == (9000, True, ("a", "b"))
    assert settings.agent_path == Path("x/y")
    assert settings.default_model is None


def test_names_of_headers_are_taken_in_any_case() -> None:
    settings = Settings.from_env({"GATEWAY_END_USER_HEADER": "X-End-User", "GATEWAY_CONTEXT_HEADERS": "X-Team, x-a"})
    assert (settings.end_user_header, settings.header_allowlist) == ("x-end-user", ("x-team", "x-a"))


class _Item(msgspec.Struct):
    id: str
    n: int = 0


class _File(msgspec.Struct):
    items: list[_Item] = []
    table: dict[str, _Item] = {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("items:\n  - id: a\n    nn: 3\n", "f.yaml:3: unknown key 'nn'; did you mean 'n'?"),
        ("items:\n  - id: a\n    n: x\n", "f.yaml:3: items[0].n: Expected 'int'"),
        ("items:\n  - n: 3\n", "f.yaml:2: items[0]: Object missing required field 'id'"),
        ("itms: []\n", "did you mean 'items'?"),
        ("table:\n  x:\n    id: a\n    zzzzz: 1\n", "f.yaml:4: unknown key 'zzzzz'; known keys: id, n"),
        ("a: [\n", "f.yaml:2:"),
        ("items:\n  - id: a\n    n: 2030-02-30\n", "f.yaml:3: 2030-02-30 is not possible: day is out of range"),
        ("- 1\n", "f.yaml:1"),
        pytest.param("items: " + "[" * 60_000 + "]" * 60_000, "f.yaml: nested too deeply", id="brackets"),
        pytest.param("items:\n  " + "- " * 60_000 + "x", "f.yaml: nested too deeply", id="dashes"),
        pytest.param("? " * 60_000, "f.yaml: nested too deeply", id="keys"),
    ],
)
def test_a_yaml_mistake_names_file_line_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path, _File)
    assert says in caught.value.message


def test_an_empty_yaml_file_is_an_empty_mapping(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("# nothing yet\n")
    assert load_yaml(path, _File) == _File()


def test_what_readiness_needs_is_named_by_known_words() -> None:
    assert Settings.from_env({"GATEWAY_READY_NEEDS": "store, redis"}).ready_needs == ("store", "redis")
    with pytest.raises(
        ConfigError, match="GATEWAY_READY_NEEDS='reddis' is not accepted; use store or redis or upstreams"
    ):
        Settings.from_env({"GATEWAY_READY_NEEDS": "store,reddis"})
