"""`upstreams.yaml` as typed values, and how the environment completes it.

```yaml
version: 1
upstreams:
  - name: local
    provider: lmstudio            # fills base_url
    default_model: qwen3-8b
aliases:
  gpt-*: local/qwen3-8b           # what an agent's fixed model name means here
```

Every key of an upstream is a field of `UpstreamConfig`; unknown keys are refused by name.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta, Struct

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.observability.logs import log_event

Provider = Literal["openai", "openai-compatible", "lmstudio", "ollama", "vllm", "demo"]
Api = Literal["chat", "responses"]
Seconds = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=1024)]

OPENAI_BASE_URL = "https://api.openai.com/v1"
OPENAI_MODELS = (
    "gpt-*",
    "chatgpt-*",
    "o[0-9]*",
    "codex-*",
    "computer-use-*",
    "text-embedding-*",
    "omni-moderation-*",
    "whisper-*",
    "tts-*",
    "dall-e-*",
    "ft:*",
)
"""Names an upstream of provider ``openai`` serves when it lists none."""

DEMO_MODEL = "demo"

HEADER_NAME = re.compile(r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
HEADER_VALUE = re.compile(r"^[\x20-\x7e]*\Z")
OWN_HEADERS = frozenset(
    (
        "host",
        "content-length",
        "content-type",
        "transfer-encoding",
        "accept-encoding",
        "connection",
        "expect",
        "upgrade",
    )
)
"""Headers that the client itself writes."""


class Timeouts(Struct, frozen=True, kw_only=True):
    """The four deadlines of a call, in seconds.

    ``first_byte_s`` runs from the request to the first byte of the answer (to the first event, where the answer is a
    stream), so it covers a model that is loaded on demand. ``idle_s`` runs between events; comments do not count.
    """

    connect_s: Seconds = 5.0
    first_byte_s: Seconds = 300.0
    idle_s: Seconds = 120.0
    total_s: Seconds = 600.0


class Limits(Struct, frozen=True, kw_only=True):
    """The largest answer that is read, in bytes on the wire; more is an error and ends the call."""

    head_bytes: Bytes = 64 * 1024
    event_bytes: Bytes = 4 * 1024 * 1024
    body_bytes: Bytes = 16 * 1024 * 1024
    stream_bytes: Bytes = 64 * 1024 * 1024


class UpstreamConfig(Struct, frozen=True, kw_only=True):
    """One server with models.

    ``provider`` fills ``base_url`` (``openai``, ``lmstudio`` :1234, ``ollama`` :11434, ``vllm`` :8000).
    ``api`` is what *agents* of this upstream speak; pass-through always relays the surface the client called. Its
    default is ``chat``, the widest, except for provider ``openai`` at api.openai.com: there it is ``responses``, as
    in the Agents SDK itself, because hosted tools exist only on that surface.
    ``models`` lists names or fnmatch patterns; ``default_model`` serves agents that name none.
    ``hosted_tools`` lists the hosted tools the server really has (``web_search``, ``file_search``, ``mcp`` …); None
    means all of them on provider ``openai`` and none elsewhere; it counts only where ``api`` is ``responses``.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    provider: Provider = "openai-compatible"
    base_url: str | None = None
    api: Api | None = None
    priority: Annotated[int, Meta(ge=1)] = 1
    api_key: str | None = None
    api_key_env: str | None = None
    models: tuple[str, ...] | None = None
    default_model: str | None = None
    health_path: Annotated[str, Meta(pattern=r"^/[!-~]*$")] = "/models"
    health_timeout_s: Seconds = 5.0
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    hosted_tools: tuple[str, ...] | None = None
    verify_tls: bool = True
    ca_file: str | None = None
    passthrough_keys: tuple[str, ...] = ()
    headers: dict[str, str] = {}

    def __repr__(self) -> str:
        """Leave the key and the extra headers out: reprs end up in logs."""
        return f"UpstreamConfig(name={self.name!r}, provider={self.provider!r}, api={self.api!r})"


class UpstreamsConfig(Struct, frozen=True, kw_only=True):
    """The file: upstreams, and aliases from a model name (or fnmatch pattern) to ``upstream/model``.

    In an alias' target ``*`` as the model keeps the name that was asked for: ``"gpt-*": "proxy/*"``.
    """

    version: Literal[1] = 1
    upstreams: tuple[UpstreamConfig, ...] = ()
    aliases: dict[str, str] = {}
    default_upstream: str | None = None
    default_model: str | None = None


def load_upstreams(settings: Settings, env: Mapping[str, str] | None = None) -> UpstreamsConfig:
    """Return the upstreams in order of priority, complete: presets filled in, ``${ENV}`` expanded, names checked.

    ``OPENAI_API_KEY`` adds the upstream ``openai`` unless the file has one of that name; the embedded ``demo`` is
    added when there would be none at all. Raises `ConfigError` naming file, upstream and key.
    """
    path = settings.config_file("upstreams.yaml")
    config = load_yaml(path, UpstreamsConfig) if path is not None else UpstreamsConfig()
    variables = _variables(settings, os.environ if env is None else env)
    upstreams = [_complete(item, variables) for item in config.upstreams]
    names = [item.name for item in upstreams]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"upstreams.yaml: two upstreams are named '{name}'; give each its own name.")
    if settings.openai_api_key and "openai" not in names:
        upstreams.append(_openai_of(settings))
    if not upstreams:
        upstreams.append(
            UpstreamConfig(name="demo", provider="demo", api="chat", models=(DEMO_MODEL,), default_model=DEMO_MODEL)
        )
    upstreams.sort(key=lambda item: item.priority)
    names = [item.name for item in upstreams]
    for pattern, target in config.aliases.items():
        upstream, slash, model = target.partition("/")
        if not slash or not model or upstream not in names:
            raise ConfigError(
                f"upstreams.yaml: aliases: '{pattern}: {target}' must point at 'upstream/model', where upstream is one "
                f"of: {', '.join(names)}."
            )
    default = settings.default_upstream or config.default_upstream
    if default is not None and default not in names:
        raise ConfigError(
            f"GATEWAY_DEFAULT_UPSTREAM (or default_upstream in upstreams.yaml) is '{default}', which is not an "
            f"upstream{_nearest(default, names)} Upstreams: {', '.join(names)}."
        )
    return msgspec.structs.replace(
        config,
        upstreams=tuple(upstreams),
        default_upstream=default,
        default_model=settings.default_model or config.default_model,
    )


_LOG = logging.getLogger(__name__)
_PRESETS: dict[str, str] = {
    "openai": OPENAI_BASE_URL,
    "lmstudio": "http://127.0.0.1:1234/v1",
    "ollama": "http://127.0.0.1:11434/v1",
    "vllm": "http://127.0.0.1:8000/v1",
}
_ENV = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _variables(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    kept = {"OPENAI_API_KEY": settings.openai_api_key, "OPENAI_BASE_URL": settings.openai_base_url}
    return {**env, **{name: value for name, value in kept.items() if value}}


def _openai_of(settings: Settings) -> UpstreamConfig:
    base_url = settings.openai_base_url or OPENAI_BASE_URL
    return _complete(
        UpstreamConfig(name="openai", provider="openai", base_url=base_url, api_key=settings.openai_api_key),
        {},
        literal_key_ok=True,
    )


def _complete(item: UpstreamConfig, variables: Mapping[str, str], *, literal_key_ok: bool = False) -> UpstreamConfig:
    where = f"upstreams.yaml: upstream '{item.name}'"
    if item.provider == "demo":
        models = item.models or (DEMO_MODEL,)
        return msgspec.structs.replace(
            item, api="chat", models=models, default_model=item.default_model or models[0], base_url=None
        )
    base_url = _expand(item.base_url, variables, f"{where}: base_url") or _PRESETS.get(item.provider)
    if base_url is None:
        raise ConfigError(f"{where}: base_url is missing; write the address up to and with /v1.")
    parts = _checked_url(base_url, f"{where}: base_url")
    for name, value in item.headers.items():
        if not HEADER_NAME.match(name) or name.lower() in OWN_HEADERS:
            raise ConfigError(f"{where}: headers: '{name}' cannot be set here.")
        if not HEADER_VALUE.match(value):
            raise ConfigError(f"{where}: headers: the value of '{name}' has characters a header cannot carry.")
    return msgspec.structs.replace(
        item,
        base_url=base_url,
        api=item.api or ("responses" if item.provider == "openai" and parts.hostname == "api.openai.com" else "chat"),
        api_key=_key(item, variables, where, literal_key_ok),
        models=OPENAI_MODELS if item.models is None and item.provider == "openai" else item.models,
        headers={name: _expand(value, variables, f"{where}: headers") or "" for name, value in item.headers.items()},
    )


def _key(item: UpstreamConfig, variables: Mapping[str, str], where: str, literal_ok: bool) -> str | None:
    if item.api_key is not None and item.api_key_env is not None:
        raise ConfigError(f"{where}: set api_key or api_key_env, not both.")
    if item.api_key_env is not None:
        key = variables.get(item.api_key_env)
        if not key:
            raise ConfigError(f"{where}: api_key_env names {item.api_key_env}, which is not set in the environment.")
    else:
        key = _expand(item.api_key, variables, f"{where}: api_key")
        if key and not literal_ok and not _ENV.search(item.api_key or ""):
            log_event(
                _LOG,
                "upstream.config.literal_key",
                level=logging.WARNING,
                upstream=item.name,
                message=f'{where}: api_key holds the key itself; write api_key: "${{SOME_VARIABLE}}" instead.',
            )
    if key and not HEADER_VALUE.match(key.strip()):
        raise ConfigError(f"{where}: the API key has characters a header cannot carry.")
    return key.strip() if key else None


def _expand(text: str | None, variables: Mapping[str, str], where: str) -> str | None:
    if text is None:
        return None

    def value_of(match: re.Match[str]) -> str:
        value = variables.get(match.group(1))
        if not value:
            raise ConfigError(f"{where} names ${{{match.group(1)}}}, which is not set in the environment.")
        return value

    return _ENV.sub(value_of, text)


def _checked_url(text: str, where: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        hostname, _ = parts.hostname, parts.port
        (hostname or "").encode("idna")
    except ValueError as error:
        raise ConfigError(f"{where}: is not an address; write it like http://127.0.0.1:1234/v1.") from error
    if parts.scheme not in ("http", "https") or not hostname or not HEADER_VALUE.match(text) or " " in text:
        raise ConfigError(f"{where}: must start with http:// or https:// and name a host.")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{where}: holds a user name or password; put the key into api_key or headers.")
    return parts


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean '{near[0]}'?" if near else "."
