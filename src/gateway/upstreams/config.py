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
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta, Struct

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.observability.logs import log_event
from gateway.upstreams.presets import PRESETS, Preset
from gateway.upstreams.proxy import proxy_from_environment

Api = Literal["chat", "responses"]
Seconds = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=1024)]

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
_NO_SERVICE = re.compile(r"[^a-z0-9_]")
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
    relay_bytes: Bytes = 1024 * 1024 * 1024


class UpstreamConfig(Struct, frozen=True, kw_only=True, dict=True):
    """One server with models.

    ``provider`` is a name of `gateway.upstreams.presets`; it fills ``base_url`` and knows how the key is shown.
    ``api`` is what *agents* of this upstream speak; pass-through always relays the surface the client called. Its
    default is ``chat``, the widest, except for provider ``openai`` at api.openai.com: there it is ``responses``, as
    in the Agents SDK itself, because hosted tools exist only on that surface.
    ``models`` lists names or fnmatch patterns; ``default_model`` serves agents that name none. ``discover`` lists the
    models of the server's own list as well; by default where it is one's own server and ``models`` is absent or has
    patterns, and at a provider's where ``models`` is given and has patterns.
    ``api_keys`` are used in turn, one per request.
    ``hosted_tools`` lists the hosted tools the server really has (``web_search``, ``file_search``, ``mcp`` …); None
    means all of them on provider ``openai`` and none elsewhere; it counts only where ``api`` is ``responses``.
    ``proxy`` is the address of an HTTP proxy, ``proxy_env`` takes it from the environment.
    ``allow_server_credentials`` says when calls are made with the keys above: ``always``; ``fallback``, where the
    caller lends no key of its own; ``never``, and then callers must.
    ``max_tokens_field`` is where the server takes the limit of a chat answer's tokens; the other field is renamed.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    provider: str = "openai-compatible"
    base_url: str | None = None
    api: Api | None = None
    priority: Annotated[int, Meta(ge=1)] = 1
    api_key: str | None = None
    api_key_env: str | None = None
    api_keys: tuple[str, ...] = ()
    api_version: Annotated[str, Meta(pattern=r"^[A-Za-z0-9.-]{1,32}$")] | None = None
    models: tuple[str, ...] | None = None
    discover: bool | None = None
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
    proxy: str | None = None
    proxy_env: bool = False
    http2: bool = False
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    allow_server_credentials: Literal["never", "fallback", "always"] = "always"

    @cached_property
    def lent_key_header(self) -> str | None:
        """The header (lower-case) in which callers lend a key of their own; None where none is taken."""
        if self.allow_server_credentials == "always":
            return None
        return f"x-cred-{_NO_SERVICE.sub('_', self.name.lower())}-api-key"

    @cached_property
    def named(self) -> frozenset[str]:
        """The models it is configured to have by name, the default one among them."""
        names = [name for name in self.models or () if not is_pattern(name)]
        return frozenset(names if self.default_model is None else [*names, self.default_model])

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """What takes further names: the patterns of ``models``, or everything where there is no list."""
        return ("*",) if self.models is None else tuple(name for name in self.models if is_pattern(name))

    def serves(self, model: str) -> bool:
        """Whether the upstream is asked for this model: ten thousand names cost what one does."""
        return model in self.named or any(fnmatchcase(model, pattern) for pattern in self.patterns)

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
    _refuse_shared_headers(upstreams)
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


def is_pattern(name: str) -> bool:
    """Return whether a model name is an fnmatch pattern."""
    return any(character in name for character in "*?[")


_LOG = logging.getLogger(__name__)
_ENV = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _variables(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    kept = {"OPENAI_API_KEY": settings.openai_api_key, "OPENAI_BASE_URL": settings.openai_base_url}
    return {**env, **{name: value for name, value in kept.items() if value}}


def _openai_of(settings: Settings) -> UpstreamConfig:
    base_url = settings.openai_base_url or PRESETS["openai"].base_url
    return _complete(
        UpstreamConfig(name="openai", provider="openai", base_url=base_url, api_key=settings.openai_api_key),
        {},
        literal_key_ok=True,
    )


def _complete(item: UpstreamConfig, variables: Mapping[str, str], *, literal_key_ok: bool = False) -> UpstreamConfig:
    where = f"upstreams.yaml: upstream '{item.name}'"
    preset = PRESETS.get(item.provider)
    if preset is None:
        raise ConfigError(
            f"{where}: there is no provider '{item.provider}'{_nearest(item.provider, list(PRESETS))} Anything that "
            f"speaks OpenAI's dialect is 'openai-compatible'. Providers: {', '.join(PRESETS)}."
        )
    if item.provider == "demo":
        if item.allow_server_credentials != "always":
            raise ConfigError(f"{where}: allow_server_credentials: the provider 'demo' takes no keys; leave it out.")
        models = item.models or (DEMO_MODEL,)
        default = item.default_model or models[0]
        return msgspec.structs.replace(
            item, api="chat", models=models, default_model=default, base_url=None, discover=False
        )
    base_url = _expand(item.base_url, variables, f"{where}: base_url") or preset.base_url
    if base_url is None:
        raise ConfigError(f"{where}: base_url is missing; write {preset.address}.")
    parts = _checked_url(base_url, f"{where}: base_url")
    if item.api_version is not None:
        base_url += f"{'&' if parts.query else '?'}api-version={item.api_version}"
    keys = _keys(item, variables, where, literal_key_ok)
    for name, value in item.headers.items():
        if not HEADER_NAME.match(name) or name.lower() in OWN_HEADERS:
            raise ConfigError(f"{where}: headers: '{name}' cannot be set here.")
        if not HEADER_VALUE.match(value):
            raise ConfigError(f"{where}: headers: the value of '{name}' has characters a header cannot carry.")
    if item.http2 and parts.scheme != "https":
        raise ConfigError(f"{where}: http2 needs a base_url that starts with https://.")
    return msgspec.structs.replace(
        item,
        base_url=base_url,
        proxy=_proxy_of(item, parts, variables, where),
        proxy_env=False,
        api=item.api or ("responses" if item.provider == "openai" and parts.hostname == "api.openai.com" else "chat"),
        api_key=keys[0] if keys else None,
        api_key_env=None,
        api_keys=keys,
        discover=_discovers(item, preset, has_keys=bool(keys)),
        models=OPENAI_MODELS if item.models is None and item.provider == "openai" else item.models,
        headers={name: _expand(value, variables, f"{where}: headers") or "" for name, value in item.headers.items()},
    )


def _refuse_shared_headers(upstreams: Sequence[UpstreamConfig]) -> None:
    """Refuse two names that read alike in a header: a key that is lent to one would go to the other, too."""
    lent: dict[str, str] = {}
    for item in upstreams:
        header = item.lent_key_header
        if header is not None and (other := lent.setdefault(header, item.name)) != item.name:
            raise ConfigError(
                f"upstreams.yaml: upstreams '{other}' and '{item.name}' would both take the keys that callers send in "
                f"'{header}'; give one of them another name."
            )


def _discovers(item: UpstreamConfig, preset: Preset, *, has_keys: bool) -> bool:
    if item.discover is not None:
        return item.discover
    if item.allow_server_credentials != "always" and not has_keys:
        return False
    if item.models is None:
        return preset.own_server
    return any(is_pattern(model) for model in item.models)


def _keys(item: UpstreamConfig, variables: Mapping[str, str], where: str, literal_ok: bool) -> tuple[str, ...]:
    if sum((item.api_key is not None, item.api_key_env is not None, bool(item.api_keys))) > 1:
        raise ConfigError(f"{where}: set one of api_key, api_key_env and api_keys.")
    if item.api_key_env is not None:
        key = variables.get(item.api_key_env)
        if not key:
            raise ConfigError(f"{where}: api_key_env names {item.api_key_env}, which is not set in the environment.")
        found = [key]
    else:
        name = "api_keys" if item.api_keys else "api_key"
        written = item.api_keys or ((item.api_key,) if item.api_key else ())
        found = [_expand(text, variables, f"{where}: {name}") or "" for text in written]
        if not literal_ok and not all(_ENV.search(text) for text in written):
            _warn_of_literal(item, f"{where}: {name}", "the key")
    keys = tuple(dict.fromkeys(key.strip() for key in found))
    if not all(keys):
        raise ConfigError(f"{where}: api_keys holds an empty key.")
    if not all(HEADER_VALUE.match(key) for key in keys):
        raise ConfigError(f"{where}: the API key has characters a header cannot carry.")
    return keys


def _proxy_of(item: UpstreamConfig, target: SplitResult, variables: Mapping[str, str], where: str) -> str | None:
    if item.proxy is not None and item.proxy_env:
        raise ConfigError(f"{where}: set one of proxy and proxy_env.")
    if item.proxy_env:
        found, where = proxy_from_environment(target.scheme, target.hostname or "", variables), f"{where}: proxy_env"
    else:
        found, where = _expand(item.proxy, variables, f"{where}: proxy"), f"{where}: proxy"
    if found is None:
        return None
    try:
        parts = urlsplit(found)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not HEADER_VALUE.match(found) or " " in found:
        raise ConfigError(
            f"{where}: is not the address of an HTTP proxy; write http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT "
            "with the password from a variable. SOCKS is not spoken."
        )
    if item.proxy is not None and parts.password and not _ENV.search(item.proxy):
        _warn_of_literal(item, where, "the password")
    return found


def _warn_of_literal(item: UpstreamConfig, where: str, what: str) -> None:
    log_event(
        _LOG,
        "upstream.config.literal_key",
        level=logging.WARNING,
        upstream=item.name,
        message=f'{where} holds {what} itself; write "${{SOME_VARIABLE}}" instead.',
    )


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
