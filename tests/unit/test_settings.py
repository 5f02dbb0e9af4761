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
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({name: value})
    assert name in caught.value.message
    assert says in caught.value.message


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
        ("- 1\n", "f.yaml:1"),
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
