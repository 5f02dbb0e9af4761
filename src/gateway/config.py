"""Settings from the environment, and the one way YAML files are read: typed, unknown keys refused by name."""

from __future__ import annotations

import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
import yaml

from gateway.errors import ConfigError

Environment = Literal["development", "production"]
ReadyNeed = Literal["store", "redis", "upstreams"]

_HOME = Path(__file__).resolve().parents[1]
"""``src/`` of a checkout, or site-packages of an installation."""

T = TypeVar("T")


class ConfigFile(msgspec.Struct, frozen=True):
    """A YAML file as it was read; ``path`` None says that there was none."""

    path: str | None
    text: str = ""


class reading_config:
    """Inside ``with``, notes in ``files`` the YAML files that are read without error, by name.

    ``kept`` files are taken as they are there, whatever the disk says; a ``with`` inside another one keeps what that
    one does. Tasks that are started inside and go on afterwards read the disk.
    """

    def __init__(self, kept: Mapping[str, ConfigFile] | None = None) -> None:
        self.files: dict[str, ConfigFile] = {}
        self._kept = kept
        self._texts: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._token: Token[reading_config | None] | None = None

    def __enter__(self) -> reading_config:
        outer = _reading()
        if self._kept is None:
            self._kept = outer._kept if outer is not None else None
        self._texts = {file.path: file.text for file in (self._kept or {}).values() if file.path is not None}
        self._token = _READING.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def is_over(self) -> bool:
        """Whether the ``with`` has been left."""
        return self._token is None

    def end(self) -> None:
        """Leave; a second time does nothing."""
        token, self._token = self._token, None
        if token is not None:
            _READING.reset(token)

    def find(self, name: str) -> ConfigFile | None:
        """Return the file that is kept under a name."""
        return self._kept.get(name) if self._kept is not None else None

    def found(self, name: str, path: Path | None) -> None:
        """Note where a file is."""
        if path is None:
            self.files[name] = ConfigFile(None)
        else:
            self._names[str(path)] = name

    def text_of(self, path: Path) -> str | None:
        """Return the text of a file that is kept."""
        return self._texts.get(str(path))

    def read(self, path: Path, text: str) -> None:
        """Note what a file holds."""
        if (name := self._names.get(str(path))) is not None:
            self.files[name] = ConfigFile(str(path), text)


_READING: ContextVar[reading_config | None] = ContextVar("gateway_reading_config", default=None)


def _reading() -> reading_config | None:
    reading = _READING.get()
    return None if reading is None or reading.is_over else reading


Read = Callable[[str, str], str]
"""Returns a setting's text as it is kept; raises `ConfigError` naming the variable, which comes first."""


def _read_header_name(name: str, text: str) -> str:
    """Return it as headers are looked up: in lower case."""
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", text):
        raise ConfigError(f"{name}={text!r} is not the name of a header; write it as X-End-User.")
    return text.lower()


def _read_address(name: str, text: str) -> str:
    if not is_web_address(text):
        raise ConfigError(f"{name}={text!r} is not an address; write https://gateway.example.com.")
    return text


def _read_log_level(name: str, text: str) -> str:
    if text.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"{name}={text!r} is not accepted; use debug, info, warning or error.")
    return text


def is_web_address(text: str) -> bool:
    """Return whether a text is an address by http or https that requests can be sent to as it stands."""
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an end, a port that is no number or above 65,535
        return False
    return whole and re.fullmatch(r"[!-~]+", text) is not None


def setting(
    env: str,
    default: Any,
    doc: str,
    *,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    read: Read | None = None,
) -> Any:
    """Declare one setting: its environment variable, default and one line of meaning.

    A ``secret`` is never shown. ``read`` judges what its type does not: a text, or each of several.
    """
    metadata = {"env": env, "doc": doc, "aliases": aliases, "secret": secret, "read": read}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the environment decides, read once at start-up."""

    environment: Environment = setting(
        "GATEWAY_ENV",
        "development",
        "`development` or `production`; production refuses keyless callers and the dev key.",
    )
    project_name: str = setting("GATEWAY_PROJECT_NAME", "agent-gateway", "Service name in `/health` and `/`.")
    host: str = setting("GATEWAY_HOST", "127.0.0.1", "Address to listen on; `::` is IPv6 alone.")
    port: int = setting("GATEWAY_PORT", 8000, "Port `gateway serve` and `gateway dev` listen on.")
    workers: int = setting("GATEWAY_WORKERS", 1, "Processes of `gateway serve`.")
    worker_timeout_s: float = setting(
        "GATEWAY_WORKER_TIMEOUT_S",
        60.0,
        "Seconds a worker of several may stand still (a tool that blocks its event loop) before it is replaced.",
    )
    tls_cert: Path | None = setting(
        "GATEWAY_TLS_CERT", None, "Certificate chain (PEM) with which `gateway serve` speaks TLS."
    )
    tls_key: Path | None = setting("GATEWAY_TLS_KEY", None, "Private key (PEM) of `GATEWAY_TLS_CERT`.")
    trusted_proxies: tuple[str, ...] = setting(
        "GATEWAY_TRUSTED_PROXIES",
        (),
        "Addresses or networks (CIDR) of proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed, "
        "comma-separated; nobody's by default.",
    )
    trusted_hosts: tuple[str, ...] = setting(
        "GATEWAY_TRUSTED_HOSTS",
        (),
        "Host names that requests may address (`api.example.com`, `*.example.com`), comma-separated; empty allows all.",
    )
    public_url: str | None = setting(
        "GATEWAY_PUBLIC_URL",
        None,
        "Address at which clients reach the gateway (`https://gateway.example.com`): MCP clients that ask where to get "
        "a token are told of it. Default: the `Host` of the request.",
        read=_read_address,
    )
    cors_origins: tuple[str, ...] = setting(
        "GATEWAY_CORS_ORIGINS",
        (),
        "Origins of web pages that may call the gateway (`https://app.example.com`), comma-separated; `*` allows all, "
        "without credentials.",
        aliases=("CORS_ORIGINS",),
    )
    ready_needs: tuple[ReadyNeed, ...] = setting(
        "GATEWAY_READY_NEEDS",
        (),
        "What must be well for `/readyz` to be 200, beside the agents: `store`, `redis`, `upstreams` (one of them), "
        "comma-separated; nothing by default, because a part that is down is down for every replica.",
    )
    head_timeout_s: float = setting(
        "GATEWAY_REQUEST_HEAD_TIMEOUT_S", 10.0, "Seconds a client may take to send the head of a request."
    )
    head_limit_bytes: int = setting(
        "GATEWAY_REQUEST_HEAD_LIMIT_BYTES", 65_536, "Largest head (request line and headers) of a request, bytes."
    )
    header_limit: int = setting("GATEWAY_REQUEST_HEADER_LIMIT", 100, "Most headers of a request.")
    keep_alive_s: float = setting("GATEWAY_KEEP_ALIVE_S", 75.0, "Seconds a connection without a request stays open.")
    client_stall_s: float = setting(
        "GATEWAY_CLIENT_STALL_S", 60.0, "Seconds a client may take to read what is sent to it before it counts as gone."
    )
    max_connections: int = setting(
        "GATEWAY_MAX_CONNECTIONS",
        10_000,
        "Connections one process serves at a time; beyond, only health and metrics are answered, the rest with 503.",
    )
    max_runs: int = setting(
        "GATEWAY_MAX_RUNS", 2_000, "Runs one process has under way at a time; beyond, requests are answered with 503."
    )
    state_dir: Path | None = setting(
        "GATEWAY_STATE_DIR",
        None,
        "State folder; default: `.gateway/` beside the agents folder in development, else the platform's data folder.",
    )
    database_url: str | None = setting(
        "GATEWAY_DATABASE_URL",
        None,
        "Database of the gateway, `postgresql://USER:PASSWORD@HOST/DATABASE`; default: SQLite in the state folder.",
        secret=True,
    )
    redis_url: str | None = setting(
        "GATEWAY_REDIS_URL",
        None,
        "Redis for what replicas share fast, `redis://:PASSWORD@HOST:6379/0`.",
        aliases=("REDIS_URL",),
        secret=True,
    )
    log_level: str = setting(
        "GATEWAY_LOG_LEVEL", "info", "`debug`, `info`, `warning` or `error`.", read=_read_log_level
    )
    log_format: Literal["json", "text"] = setting(
        "GATEWAY_LOG_FORMAT", "json", "`json`, for machines, or `text`, for a terminal; the same secrets are masked."
    )
    log_exception_text: bool = setting(
        "GATEWAY_LOG_EXCEPTION_TEXT",
        False,
        "Put the texts of exceptions, which may quote prompts and secrets, beside their types and places into the log; "
        "on in `gateway dev`.",
    )
    traces: float = setting(
        "GATEWAY_TRACES",
        0.0,
        "Share of the requests, 0 to 1, that are traced and sent by OTLP to `OTEL_EXPORTER_OTLP_ENDPOINT`; `1` traces "
        "all.",
    )
    traces_content: bool = setting(
        "GATEWAY_TRACES_CONTENT", False, "Let traces hold prompts, answers, and arguments and results of tools."
    )
    key_failures_per_minute: int = setting(
        "GATEWAY_KEY_FAILURES_PER_MINUTE",
        30,
        "Wrong keys one address may show within a minute before it is turned away with 429.",
    )
    api_key: str | None = setting(
        "GATEWAY_API_KEY", None, "One admin key, beside those in `security.yaml`.", secret=True
    )
    key_pepper: str | None = setting(
        "GATEWAY_KEY_PEPPER",
        None,
        "Secret that the digests of keys made at run time are keyed with; without it they cannot be guessed from the "
        "database. The same in every process, and for ever.",
        secret=True,
    )
    metrics_token: str | None = setting(
        "GATEWAY_METRICS_TOKEN",
        None,
        "Bearer token that may read `/metrics` and `/metrics/prometheus`, nothing else.",
        secret=True,
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
    cache_config: Path | None = setting("GATEWAY_CACHE_CONFIG", None, "Path of `cache.yaml`.")
    usage_ledger: bool = setting(
        "GATEWAY_USAGE_LEDGER", True, "Keep a row for every run and model call in the database, for `GET /usage`."
    )
    usage_flush_s: float = setting(
        "GATEWAY_USAGE_FLUSH_S", 1.0, "Seconds between two writes of the usage ledger: what `kill -9` loses."
    )
    usage_retention_days: int = setting("GATEWAY_USAGE_RETENTION_DAYS", 90, "Days that rows of the ledger are kept.")
    tool_config: Path | None = setting("GATEWAY_TOOL_CONFIG", None, "Path of `tools.yaml`.")
    tool_auto_reload: bool = setting(
        "GATEWAY_TOOL_AUTO_RELOAD", False, "Watch `tools.yaml` and the files it names, and reload it when they change."
    )
    upstream_auto_reload: bool = setting(
        "GATEWAY_UPSTREAM_AUTO_RELOAD",
        False,
        "Watch `upstreams.yaml`, `routing.yaml`, `prices.yaml` and `cache.yaml`, and reload them when they change.",
    )
    upstream_discovery_s: float = setting(
        "GATEWAY_UPSTREAM_DISCOVERY_S", 300.0, "Seconds between two looks at an upstream's own list of models."
    )
    openai_api_key: str | None = setting(
        "OPENAI_API_KEY",
        None,
        "Adds the upstream `openai`; moved out of the process environment at start, so that drop-ins never hold it.",
        secret=True,
    )
    openai_base_url: str | None = setting(
        "OPENAI_BASE_URL", None, "Base URL of the upstream `openai` that `OPENAI_API_KEY` adds."
    )

    body_limit_bytes: int = setting("GATEWAY_REQUEST_BODY_LIMIT_BYTES", 10_000_000, "Largest request body, bytes.")
    upload_limit_bytes: int = setting(
        "GATEWAY_UPLOAD_LIMIT_BYTES",
        50_000_000,
        "Largest body that is relayed piece by piece (files, audio, images), bytes.",
    )
    body_timeout_s: float = setting(
        "GATEWAY_REQUEST_BODY_TIMEOUT_S",
        30.0,
        "Seconds a client may take to send its body, or the next piece of an upload.",
    )
    rate_limit_per_minute: int | None = setting(
        "GATEWAY_RATE_LIMIT_PER_MINUTE",
        None,
        "Requests a minute for each key whose limits, and the defaults in `security.yaml`, say nothing.",
        aliases=("API_RATE_LIMIT_PER_MINUTE", "RATE_LIMIT_PER_MINUTE"),
    )
    limits_store: Literal["auto", "memory", "redis", "sql"] = setting(
        "GATEWAY_LIMITS_STORE",
        "auto",
        "Where limits and budgets are counted: `memory` (this process alone), `redis`, `sql`; `auto` takes Redis where "
        "`GATEWAY_REDIS_URL` is set, `sql` where `GATEWAY_DATABASE_URL` is or several workers serve, else `memory`.",
    )
    end_user_header: str | None = setting(
        "GATEWAY_END_USER_HEADER",
        None,
        "Request header that names the end user, before the body's `user`; for limits of each end user.",
        read=_read_header_name,
    )
    reserved_output_tokens: int = setting(
        "GATEWAY_RESERVED_OUTPUT_TOKENS",
        4_096,
        "Tokens that a model call without `max_completion_tokens` is taken to write, until it has.",
    )
    run_max_depth: int = setting("GATEWAY_RUN_MAX_DEPTH", 8, "Runs inside runs (agents as tools) that a run may have.")
    run_max_model_calls: int | None = setting(
        "GATEWAY_RUN_MAX_MODEL_CALLS",
        None,
        "Model calls of a run over all its agents; default: ten for each turn that its first agent may take.",
    )
    run_max_tool_calls: int = setting(
        "GATEWAY_RUN_MAX_TOOL_CALLS", 500, "Tool calls in the gateway that a run may make over all its agents."
    )
    run_max_tokens: int = setting(
        "GATEWAY_RUN_MAX_TOKENS", 5_000_000, "Tokens that a run may use over all its agents, read and written."
    )
    run_max_cost_usd: float = setting(
        "GATEWAY_RUN_MAX_COST_USD", 100.0, "What the model calls of a run over all its agents may cost, USD."
    )
    budget_alert_url: str | None = setting(
        "GATEWAY_BUDGET_ALERT_URL", None, "Address that is told when shares of a budget are spent.", secret=True
    )
    budget_alert_secret: str | None = setting(
        "GATEWAY_BUDGET_ALERT_SECRET",
        None,
        "Secret that budget alerts are signed with; needed with the address.",
        secret=True,
    )
    budget_alert_shares: tuple[str, ...] = setting(
        "GATEWAY_BUDGET_ALERT_SHARES", ("0.5", "0.8", "1.0"), "Shares of a budget to tell of, comma-separated."
    )
    run_timeout_s: float = setting("GATEWAY_RUN_TIMEOUT_S", 600.0, "Seconds a run may take in all.")
    drain_s: float = setting(
        "GATEWAY_SHUTDOWN_DRAIN_S", 10.0, "Seconds that live runs may take to end once the process is asked to stop."
    )
    ping_s: float = setting("GATEWAY_STREAM_PING_S", 15.0, "Seconds of silence before a stream sends a comment.")
    header_allowlist: tuple[str, ...] = setting(
        "GATEWAY_CONTEXT_HEADERS",
        ("x-request-id", "x-session-id", "x-correlation-id", "user-agent", "accept-language"),
        "Request headers that agents may read from their context, comma-separated.",
        read=_read_header_name,
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
                    values[item.name] = _parse(name, text.strip(), hints[item.name], item.metadata["read"])
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

    def state_folder(self) -> Path:
        """Return the folder for what outlives the process; whoever writes there makes it."""
        if self.state_dir is not None:
            return self.state_dir
        if self.is_development:
            return self.agents_root().resolve().parent / ".gateway"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "agent-gateway"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "agent-gateway"
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "agent-gateway"

    def config_file(self, name: str) -> Path | None:
        """Find ``name`` (``security.yaml`` …).

        A file that is kept (`reading_config`) is where it was. Else looked at in order: its variable, ``config/``
        beside the agents folder, the checkout, the packaged defaults. An explicitly named file that does not exist is
        a `ConfigError`; otherwise None means "there is none".
        """
        reading = _reading()
        if reading is None:
            return self._on_disk(name)
        kept = reading.find(name)
        path = self._on_disk(name) if kept is None else None if kept.path is None else Path(kept.path)
        reading.found(name, path)
        return path

    def _on_disk(self, name: str) -> Path | None:
        explicit = {
            "agents.yaml": self.agent_config,
            "upstreams.yaml": self.upstream_config,
            "security.yaml": self.security_config,
            "routing.yaml": self.routing_config,
            "prices.yaml": self.prices_config,
            "tools.yaml": self.tool_config,
            "cache.yaml": self.cache_config,
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
        text = config_text(path)
        tree, data = _parsed(text)
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ConfigError(f"{path.name}: nested too deeply.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}" if mark is not None else path.name
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{where}: {problem}.") from error
    data = {} if data is None else data
    _refuse_unknown_keys(data, type_, path.name, tree, ())
    try:
        found = msgspec.convert(data, type=type_)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        keys = _split_path(at.rstrip("`"))
        name = at.rstrip("`").lstrip(".") or "the file"
        known = _values(type_, keys, data) if message.startswith("Invalid ") else ()
        words = message.replace("`", "'") + (f"; use {' or '.join(map(str, known))}" if known else "")
        raise ConfigError(f"{path.name}:{_line(tree, keys)}: {name}: {words}.") from error
    if (reading := _reading()) is not None:
        reading.read(path, text)
    return found


def convert_values(values: Any, type_: Any) -> Any:
    """Return plain values as ``type_``, as strictly as `load_yaml` reads a file; raise `ConfigError` naming the key."""
    try:
        _refuse_unknown_keys(values, type_, "", None, ())
        return msgspec.convert(values, type=type_)
    except ConfigError as error:
        raise ConfigError(error.message.removeprefix(":1: ")) from error
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        place = at.rstrip("`").lstrip(".")
        raise ConfigError(f"{f'{place}: ' if place else ''}{message.replace('`', chr(39))}.") from error


def config_text(path: Path) -> str:
    """Return what a YAML file holds, or held when it was kept; raise `OSError` and `UnicodeDecodeError`."""
    reading = _reading()
    kept = reading.text_of(path) if reading is not None else None
    return path.read_text(encoding="utf-8") if kept is None else kept


def _parsed(text: str) -> tuple[Any, Any]:
    """Return the nodes, which know their lines, and the values; by libyaml where it is there, ten times as fast.

    Raises `RecursionError` for what may be nested so deeply that libyaml's loader would end the process.
    """
    loader = (yaml.SafeLoader if _may_be_deep(text) else getattr(yaml, "CSafeLoader", yaml.SafeLoader))(text)
    try:
        tree = loader.get_single_node()
        try:
            return tree, None if tree is None else loader.construct_document(tree)
        except ValueError as error:
            raise _impossible(tree) from error
    finally:
        loader.dispose()


def _may_be_deep(text: str) -> bool:
    depth = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "[{" else -1
        if depth > _DEEP:
            return True
    return any(line.count("- ") + line.count("? ") > _DEEP for line in text.splitlines())


_BRACKETS = re.compile(r"[][{}]")
_DEEP = 200


def _impossible(tree: Any) -> yaml.YAMLError:
    """Return the error that names a value that looks like a date and is none: YAML's own says only what is wrong."""
    waiting, seen = [tree], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            try:
                yaml.SafeLoader("").construct_object(node)
            except ValueError as error:
                return yaml.MarkedYAMLError(None, None, f"{node.value} is not possible: {error}", node.start_mark)
        else:
            waiting += (
                [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            )
    return yaml.YAMLError()


def _parse(name: str, text: str, hint: Any, read: Read | None) -> Any:
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
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        return tuple(_parse(name, part, typing.get_args(kind)[0], read) for part in parts)
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if text not in allowed:
            raise ConfigError(f"{name}={text!r} is not accepted; use {' or '.join(map(str, allowed))}.")
    return text if read is None else read(name, text)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _refuse_unknown_keys(data: Any, hint: Any, file: str, tree: Any, at: tuple[str | int, ...]) -> None:
    if _is_union(hint):
        structs = [k for k in typing.get_args(hint) if _holds_struct(k)]
        hint = structs[0] if len(structs) == 1 else _tagged(structs, data)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple) and isinstance(data, list) and arguments:
        for index, item in enumerate(data):
            _refuse_unknown_keys(item, arguments[0], file, tree, (*at, index))
    elif origin is dict and isinstance(data, dict):
        for key, item in data.items():
            _refuse_unknown_keys(item, arguments[1], file, tree, (*at, key))
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct) and isinstance(data, dict):
        known = {f.encode_name: f.type for f in msgspec.structs.fields(hint)}
        if hint.__struct_config__.tag_field is not None:
            known[hint.__struct_config__.tag_field] = str
        for key, item in data.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint_text = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}."
                raise ConfigError(f"{file}:{_line(tree, (*at, key))}: unknown key '{key}'; {hint_text}")
            _refuse_unknown_keys(item, known[key], file, tree, (*at, key))


def _values(hint: Any, keys: Sequence[str | int], data: Any) -> tuple[Any, ...]:
    """Return the words that may stand at a place, where they are few: those of a Literal, or the tags of a union."""
    for key in keys:
        while typing.get_origin(hint) is dict:  # whose keys a complaint does not name
            hint, data = typing.get_args(hint)[1], None
        if _is_union(hint):
            structs = [k for k in typing.get_args(hint) if _holds_struct(k)]
            tags = {
                k.__struct_config__.tag: k.__struct_config__.tag_field
                for k in structs
                if hasattr(k, "__struct_config__")
            }
            if key in tags.values():
                return tuple(tags)
            hint = structs[0] if len(structs) == 1 else _tagged(structs, data)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (list, tuple) and arguments:
            hint = arguments[0]
        elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            hint = {f.encode_name: f.type for f in msgspec.structs.fields(hint)}.get(str(key))
        try:
            data = data[key]
        except (LookupError, TypeError):
            data = None
    found = typing.get_args(hint) if _is_union(hint) else (hint,)
    return tuple(word for kind in found if typing.get_origin(kind) is Literal for word in typing.get_args(kind))


def _tagged(structs: list[Any], data: Any) -> Any:
    """Return the struct of a tagged union that ``data`` says it is; None leaves the complaint to the conversion."""
    if not isinstance(data, dict):
        return None
    configs = [(k, k.__struct_config__) for k in structs if isinstance(k, type) and issubclass(k, msgspec.Struct)]
    return next((k for k, c in configs if c.tag_field is not None and data.get(c.tag_field) == c.tag), None)


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
