"""Settings from the environment, and the one way YAML files are read: typed, unknown keys refused by name."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import yaml

from gateway.errors import ConfigError

Environment = Literal["development", "production"]

_HOME = Path(__file__).resolve().parents[1]
"""``src/`` of a checkout, or site-packages of an installation."""

T = TypeVar("T")


def setting(env: str, default: Any, doc: str, *, aliases: tuple[str, ...] = ()) -> Any:
    """Declare one setting: its environment variable, default and one line of meaning."""
    return field(default=default, metadata={"env": env, "doc": doc, "aliases": aliases})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the environment decides, read once at start-up."""

    environment: Environment = setting(
        "GATEWAY_ENV",
        "development",
        "`development` or `production`; production refuses keyless callers and the dev key.",
    )
    project_name: str = setting("GATEWAY_PROJECT_NAME", "agent-gateway", "Service name in `/health` and `/`.")
    host: str = setting("GATEWAY_HOST", "127.0.0.1", "Address `gateway dev` listens on.")
    port: int = setting("GATEWAY_PORT", 8000, "Port `gateway dev` listens on.")
    state_dir: Path | None = setting(
        "GATEWAY_STATE_DIR", None, "State folder; default `.gateway/` beside the agents folder."
    )
    log_level: str = setting("GATEWAY_LOG_LEVEL", "info", "`debug`, `info`, `warning` or `error`.")
    api_key: str | None = setting("GATEWAY_API_KEY", None, "One admin key, beside those in `security.yaml`.")
    metrics_token: str | None = setting(
        "GATEWAY_METRICS_TOKEN", None, "Bearer token that may read `/metrics` and `/metrics/prometheus`, nothing else."
    )
    prometheus_enabled: bool = setting("GATEWAY_PROMETHEUS_ENABLED", True, "Serve the Prometheus exposition.")

    agent_path: Path | None = setting(
        "GATEWAY_AGENT_DISCOVERY_PATH", None, "The drop-in folder; default `./src/agents`, else `./agents`."
    )
    agent_package: str | None = setting(
        "GATEWAY_AGENT_DISCOVERY_PACKAGE", None, "An importable package whose folder replaces the drop-in folder."
    )
    agent_extra_paths: tuple[str, ...] = setting(
        "GATEWAY_AGENT_DISCOVERY_EXTRA_PATHS", (), "More drop-in folders, comma-separated."
    )
    agent_extra_package: str | None = setting(
        "GATEWAY_AGENT_DISCOVERY_EXTRA_PACKAGE", None, "An importable package whose folder is one more drop-in folder."
    )
    agent_exports: tuple[str, ...] = setting(
        "GATEWAY_AGENT_EXPORTS",
        ("agent", "root_agent", "main_agent", "app", "build_agent", "create_agent", "get_agent"),
        "Names looked at in a drop-in module, first match first, comma-separated.",
    )
    agent_allowlist: tuple[str, ...] = setting(
        "GATEWAY_AGENT_DISCOVERY_ALLOWLIST", (), "fnmatch patterns of modules that may load; empty allows all."
    )
    agent_denylist: tuple[str, ...] = setting(
        "GATEWAY_AGENT_DISCOVERY_DENYLIST",
        (),
        "fnmatch patterns of modules that may not load or be imported; deny wins.",
    )
    agent_auto_reload: bool = setting(
        "GATEWAY_AGENT_AUTO_RELOAD",
        False,
        "Watch drop-in folders and YAML files and reload what changed.",
        aliases=("GATEWAY_AGENT_WATCH",),
    )
    agent_import_timeout_s: float = setting(
        "GATEWAY_AGENT_IMPORT_TIMEOUT_S", 10.0, "Seconds a drop-in may take to import before it is given up."
    )
    agent_max_turns: int = setting(
        "GATEWAY_AGENT_MAX_TURNS", 10, "Model turns a run may take when the agent does not say."
    )
    default_namespace: str = setting(
        "GATEWAY_DEFAULT_NAMESPACE", "default", "Namespace of agents that stand directly in the drop-in folder."
    )
    default_upstream: str | None = setting(
        "GATEWAY_DEFAULT_UPSTREAM", None, "Upstream of agents that name none; default: the first by `priority`."
    )
    default_model: str | None = setting(
        "GATEWAY_DEFAULT_MODEL", None, "Upstream model of agents that name none; default: the upstream's own default."
    )

    agent_config: Path | None = setting("GATEWAY_AGENT_CONFIG", None, "Path of `agents.yaml`.")
    upstream_config: Path | None = setting("GATEWAY_UPSTREAM_CONFIG", None, "Path of `upstreams.yaml`.")
    security_config: Path | None = setting("GATEWAY_SECURITY_CONFIG", None, "Path of `security.yaml`.")
    routing_config: Path | None = setting("GATEWAY_ROUTING_CONFIG", None, "Path of `routing.yaml`.")
    prices_config: Path | None = setting("GATEWAY_PRICES_CONFIG", None, "Path of `prices.yaml`.")
    upstream_auto_reload: bool = setting(
        "GATEWAY_UPSTREAM_AUTO_RELOAD",
        False,
        "Watch `upstreams.yaml`, `routing.yaml` and `prices.yaml`, and reload them when they change.",
    )
    upstream_discovery_s: float = setting(
        "GATEWAY_UPSTREAM_DISCOVERY_S", 300.0, "Seconds between two looks at an upstream's own list of models."
    )
    openai_api_key: str | None = setting(
        "OPENAI_API_KEY",
        None,
        "Adds the upstream `openai`; moved out of the process environment at start, so that drop-ins never hold it.",
    )
    openai_base_url: str | None = setting(
        "OPENAI_BASE_URL", None, "Base URL of the upstream `openai` that `OPENAI_API_KEY` adds."
    )

    body_limit_bytes: int = setting("GATEWAY_REQUEST_BODY_LIMIT_BYTES", 10_000_000, "Largest request body, bytes.")
    upload_limit_bytes: int = setting(
        "GATEWAY_UPLOAD_LIMIT_BYTES",
        536_870_912,
        "Largest body that is relayed piece by piece (files, audio, images), bytes.",
    )
    body_timeout_s: float = setting(
        "GATEWAY_REQUEST_BODY_TIMEOUT_S",
        30.0,
        "Seconds a client may take to send its body, or the next piece of an upload.",
    )
    run_timeout_s: float = setting("GATEWAY_RUN_TIMEOUT_S", 600.0, "Seconds a run may take in all.")
    drain_s: float = setting(
        "GATEWAY_SHUTDOWN_DRAIN_S", 20.0, "Seconds that live runs may take to end once the process is asked to stop."
    )
    ping_s: float = setting("GATEWAY_STREAM_PING_S", 15.0, "Seconds of silence before a stream sends a comment.")
    header_allowlist: tuple[str, ...] = setting(
        "GATEWAY_CONTEXT_HEADERS",
        ("x-request-id", "x-session-id", "x-correlation-id", "user-agent", "accept-language"),
        "Request headers that agents may read from their context, comma-separated.",
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raise `ConfigError` naming the variable and what it accepts."""
        source = os.environ if env is None else env
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for item in fields(cls):
            for name in (item.metadata["env"], *item.metadata["aliases"]):
                text = source.get(name)
                if text is not None and text.strip():
                    values[item.name] = _parse(name, text.strip(), hints[item.name])
                    break
        return cls(**values)

    @property
    def is_development(self) -> bool:
        """Whether the dev key and keyless loopback callers are honoured."""
        return self.environment == "development"

    def agents_root(self) -> Path:
        """Return the drop-in folder (it need not exist yet)."""
        if self.agent_path is not None:
            return self.agent_path
        candidate = Path("src/agents")
        return candidate if candidate.is_dir() or not Path("agents").is_dir() else Path("agents")

    def config_file(self, name: str) -> Path | None:
        """Find ``name`` (``security.yaml`` …).

        Looked at in order: its variable, ``config/`` beside the agents folder, the checkout, the packaged defaults.
        An explicitly named file that does not exist is a `ConfigError`; otherwise None means "there is none".
        """
        explicit = {
            "agents.yaml": self.agent_config,
            "upstreams.yaml": self.upstream_config,
            "security.yaml": self.security_config,
            "routing.yaml": self.routing_config,
            "prices.yaml": self.prices_config,
        }.get(name)
        if explicit is not None:
            if not explicit.is_file():
                raise ConfigError(f"{explicit} does not exist; it is named as the path of {name} by the environment.")
            return explicit
        beside = self.agents_root().resolve().parent / "config"
        checkout = [_HOME / "config"] if _HOME.name == "src" else []
        for folder in (beside, *checkout, _HOME / "gateway" / "defaults"):
            if (folder / name).is_file():
                return folder / name
        return None


def load_yaml(path: Path, type_: type[T]) -> T:
    """Read one YAML file into ``type_`` (a `msgspec.Struct`).

    Raises `ConfigError` with file, line and key: for bad YAML, a wrong type, a missing key, or an unknown key
    (naming the nearest known one). An empty file is an empty mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}" if mark is not None else path.name
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{where}: {problem}.") from error
    data = {} if data is None else data
    _refuse_unknown_keys(data, type_, path.name, tree, ())
    try:
        return msgspec.convert(data, type=type_)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        keys = _split_path(at.rstrip("`"))
        name = at.rstrip("`").lstrip(".") or "the file"
        raise ConfigError(f"{path.name}:{_line(tree, keys)}: {name}: {message.replace('`', chr(39))}.") from error


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = [k for k in typing.get_args(hint) if k is not type(None)] if _is_union(hint) else [hint]
    kind = kinds[0]
    if kind is bool:
        lowered = text.lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{name}={text!r} is not a switch; use 1 or 0.")
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError as error:
            raise ConfigError(f"{name}={text!r} is not a number.") from error
        if not value > 0:
            raise ConfigError(f"{name}={text!r} must be greater than 0.")
        return value
    if kind is Path:
        return Path(text).expanduser()
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if text not in allowed:
            raise ConfigError(f"{name}={text!r} is not accepted; use {' or '.join(map(str, allowed))}.")
    if name == "GATEWAY_LOG_LEVEL" and text.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"{name}={text!r} is not accepted; use debug, info, warning or error.")
    return text


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _refuse_unknown_keys(data: Any, hint: Any, file: str, tree: Any, at: tuple[str | int, ...]) -> None:
    if _is_union(hint):
        structs = [k for k in typing.get_args(hint) if _holds_struct(k)]
        hint = structs[0] if len(structs) == 1 else None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple) and isinstance(data, list) and arguments:
        for index, item in enumerate(data):
            _refuse_unknown_keys(item, arguments[0], file, tree, (*at, index))
    elif origin is dict and isinstance(data, dict):
        for key, item in data.items():
            _refuse_unknown_keys(item, arguments[1], file, tree, (*at, key))
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct) and isinstance(data, dict):
        known = {f.encode_name: f.type for f in msgspec.structs.fields(hint)}
        for key, item in data.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint_text = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}."
                raise ConfigError(f"{file}:{_line(tree, (*at, key))}: unknown key '{key}'; {hint_text}")
            _refuse_unknown_keys(item, known[key], file, tree, (*at, key))


def _holds_struct(hint: Any) -> bool:
    return any(isinstance(k, type) and issubclass(k, msgspec.Struct) for k in (hint, *typing.get_args(hint)))


def _split_path(path: str) -> tuple[str | int, ...]:
    return tuple(int(index) if index else key for index, key in re.findall(r"\[(\d+)\]|\.?([^.\[\]]+)", path))


def _line(tree: Any, keys: tuple[str | int, ...]) -> int:
    node, line = tree, 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == str(key)]
            if not pairs:
                return line
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            return line
    return line
