"""`cache.yaml` as typed values, and the rule that a model's name has."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from msgspec import Meta, Struct

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError

_REMEMBERED = 4_096

Sharing = Literal["key", "namespace", "everyone"]


class CacheRule(Struct, frozen=True, kw_only=True):
    """How answers of the models that ``match`` are kept.

    ``match`` is the model as clients name it, or an fnmatch pattern of it. ``sharing`` says whose answer a caller may
    get: its own key's, its namespace's, or anybody's. ``wait_s`` is how long a process waits at most for the same
    answer that another process is fetching (Redis only).
    """

    match: Annotated[str, Meta(min_length=1)]
    backend: Literal["memory", "redis"] = "memory"
    ttl_s: Annotated[float, Meta(ge=0.001, le=31_536_000)] = 3600.0
    max_body_bytes: Annotated[int, Meta(ge=1024, le=64 * 1024 * 1024)] = 1024 * 1024
    sharing: Sharing = "key"
    streams: bool = False
    tools: bool = False
    wait_s: Annotated[float, Meta(ge=0, le=120)] = 10.0


class MemoryLimits(Struct, frozen=True, kw_only=True):
    """What the answers in memory may take, per process."""

    max_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024 * 1024
    max_entries: Annotated[int, Meta(ge=1)] = 10_000


class RedisRules(Struct, frozen=True, kw_only=True):
    """How long Redis may take for one command, and how long it is left alone once it has failed."""

    timeout_s: Annotated[float, Meta(gt=0, le=5)] = 0.25
    pause_s: Annotated[float, Meta(ge=0.1)] = 5.0


class CacheConfig(Struct, frozen=True, kw_only=True):
    """The file."""

    version: Literal[1] = 1
    models: tuple[CacheRule, ...] = ()
    memory: MemoryLimits = MemoryLimits()
    redis: RedisRules = RedisRules()


class CacheRules:
    """Finds the rule of a model: an exact name first, then the patterns in the order written."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._exact = {rule.match: rule for rule in config.models}
        self._found: dict[str, CacheRule | None] = {}

    def __bool__(self) -> bool:
        return bool(self._exact)

    def find(self, model: str) -> CacheRule | None:
        """Return the rule of a model, or None: it is never cached."""
        try:
            return self._found[model]
        except KeyError:
            pass
        found = self._exact.get(model)
        if found is None:
            found = next((rule for rule in self.config.models if fnmatchcase(model, rule.match)), None)
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        self._found[model] = found
        return found


def load_cache(settings: Settings) -> CacheRules:
    """Return the rules of `cache.yaml`. Raises `ConfigError` naming file and key."""
    path = settings.config_file("cache.yaml")
    config = load_yaml(path, CacheConfig) if path is not None else CacheConfig()
    seen = set[str]()
    for rule in config.models:
        where = f"cache.yaml: models: '{rule.match}'"
        if rule.match in seen:
            raise ConfigError(f"{where} stands there twice; leave one of them.")
        seen.add(rule.match)
        if rule.backend == "redis" and settings.redis_url is None:
            raise ConfigError(
                f"{where}: backend: redis needs the address of a Redis in GATEWAY_REDIS_URL (redis://host:6379/0)."
            )
    return CacheRules(config)
