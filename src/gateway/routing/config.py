"""`routing.yaml` as typed values.

```yaml
version: 1
models:
  smart:                          # a virtual model: several targets behind one name
    strategy: weighted
    targets:
      - {model: openai/gpt-5-mini, weight: 3}
      - {model: local/qwen3-8b}
    context_length_fallbacks: [openai/gpt-5]
    settings: {temperature: 0.2}
```
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Annotated, Literal

from msgspec import Meta, Struct

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.model_settings import ModelSettings

Strategy = Literal["priority", "weighted", "least_busy", "lowest_latency"]
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}\Z")


class RetryRule(Struct, frozen=True, kw_only=True):
    """How often one target is asked for one class of failures: ``attempts`` counts the first try.

    The wait before the second try is ``backoff_s``, and doubles from there, with up to half as much again by chance.
    """

    attempts: Annotated[int, Meta(ge=1, le=5)] = 1
    backoff_s: Annotated[float, Meta(ge=0, le=10)] = 0.05


class RetryRules(Struct, frozen=True, kw_only=True):
    """The retry rule of each class of failures; the default is one quick retry where no connection came about."""

    connect: RetryRule = RetryRule(attempts=2)
    timeout: RetryRule = RetryRule()
    rate_limit: RetryRule = RetryRule()
    server_error: RetryRule = RetryRule()
    malformed: RetryRule = RetryRule()
    incomplete: RetryRule = RetryRule()


class BreakerRules(Struct, frozen=True, kw_only=True):
    """When a model of an upstream is left alone: after ``failures`` in a row, for ``open_s``; then one probe decides.

    A model with a single target is tried all the same, unless ``refuse_when_alone``: refusing would help nobody.
    """

    failures: Annotated[int, Meta(ge=1)] = 5
    open_s: Annotated[float, Meta(gt=0)] = 10.0
    refuse_when_alone: bool = False


class CooldownRules(Struct, frozen=True, kw_only=True):
    """How long a model of an upstream rests after a 429 or a 503 with ``Retry-After``.

    ``default_s`` is for a 429 that does not say; an upstream's own word counts up to ``longest_s``.
    """

    default_s: Annotated[float, Meta(ge=0)] = 5.0
    longest_s: Annotated[float, Meta(gt=0)] = 60.0


class HedgeRules(Struct, frozen=True, kw_only=True):
    """When a second target is asked because the first one is slow: at most once per call, within ``retry_budget``.

    ``after_s`` without a first byte; or after ``percentile`` of the target's latest first-byte times, never sooner than
    ``after_s`` where both are given. Until 20 times are known, ``after_s`` alone counts.
    """

    after_s: Annotated[float, Meta(gt=0)] | None = None
    percentile: Annotated[float, Meta(ge=50, lt=100)] | None = None


class TargetRow(Struct, frozen=True, kw_only=True):
    """One target: ``model`` is ``upstream/model``; ``weight`` counts for ``weighted`` and ``least_busy``."""

    model: str
    weight: Annotated[float, Meta(gt=0)] = 1.0


class ModelRouting(Struct, frozen=True, kw_only=True):
    """One model name: a virtual model if it has ``targets``, else what happens when the model of that name fails.

    Each list of fallbacks names other models (virtual, or ``upstream/model``), whose targets are tried in order once
    those of this one have failed; the fallbacks of a fallback are not followed. ``settings`` are for calls of this name
    that do not say them themselves, whoever answers.
    """

    targets: tuple[TargetRow, ...] = ()
    strategy: Strategy = "priority"
    fallbacks: tuple[str, ...] = ()
    context_length_fallbacks: tuple[str, ...] = ()
    content_policy_fallbacks: tuple[str, ...] = ()
    retry: RetryRules | None = None
    hedge: HedgeRules | None = None
    settings: ModelSettings | None = None


class RoutingConfig(Struct, frozen=True, kw_only=True):
    """The file. ``retry_budget``: how many further tries may go out, as a share of the calls that begin at a target."""

    version: Literal[1] = 1
    models: dict[str, ModelRouting] = {}
    retry: RetryRules = RetryRules()
    retry_budget: Annotated[float, Meta(ge=0, le=0.2)] = 0.2
    breaker: BreakerRules = BreakerRules()
    cooldown: CooldownRules = CooldownRules()
    health_interval_s: Annotated[float, Meta(ge=1)] = 15.0


def load_routing(settings: Settings, upstreams: Collection[str]) -> RoutingConfig:
    """Return the routing rules; ``upstreams`` are the configured names. Raises `ConfigError` naming file and key."""
    path = settings.config_file("routing.yaml")
    config = load_yaml(path, RoutingConfig) if path is not None else RoutingConfig()
    for name, model in config.models.items():
        where = f"routing.yaml: models: '{name}'"
        if not NAME.match(name):
            raise ConfigError(f"{where}: a model name has letters, digits and . _ : / - only.")
        for row in model.targets:
            _check(row.model, upstreams, f"{where}: targets")
        _check_hedge(model, where)
        if not model.targets:
            _check(name, upstreams, f"{where} has no targets, so it is not a virtual model; then its name")
        for key in ("fallbacks", "context_length_fallbacks", "content_policy_fallbacks"):
            for other in getattr(model, key):
                virtual = config.models.get(other)
                if virtual is None or not virtual.targets:
                    _check(other, upstreams, f"{where}: {key}")
    return config


def _check_hedge(model: ModelRouting, where: str) -> None:
    hedge = model.hedge
    if hedge is None:
        return
    if hedge.after_s is None and hedge.percentile is None:
        raise ConfigError(f"{where}: hedge needs after_s (seconds), percentile (50 up to 100), or both.")
    if len(model.targets) < 2:
        raise ConfigError(f"{where}: hedge asks a second target, so the model needs two targets at least.")


def _check(model_id: str, upstreams: Collection[str], where: str) -> None:
    upstream, slash, model = model_id.partition("/")
    if slash and model and upstream in upstreams:
        return
    near = difflib.get_close_matches(upstream, upstreams, 1)
    hint = f" Did you mean '{near[0]}/{model or 'MODEL'}'?" if near else ""
    raise ConfigError(
        f"{where}: '{model_id}' must be 'upstream/model', where upstream is one of: {', '.join(upstreams)}.{hint}"
    )
