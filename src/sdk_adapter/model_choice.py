"""The names of agents' models: what the operator says beside one (`model_config` of agents.yaml), and what it means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.registry.entry import ModelConfig

if TYPE_CHECKING:
    from gateway.routing.targets import Binding, ModelTable

PLACEHOLDER_MODEL = "gateway-default"
"""Stands where the SDK would assume a GPT-5 model, and its settings, for agents that name no model."""


class ChosenModel(str):
    """The name of an agent's model with what the operator says beside it; the SDK hands names on untouched.

    ``upstream`` is the agent's own, also where it runs beside agents of another one.
    """

    upstream: str | None
    fallbacks: tuple[str, ...]

    def __new__(cls, name: str | None, upstream: str | None, fallbacks: tuple[str, ...]) -> ChosenModel:
        """Make one; ``name`` None is the default model."""
        made = super().__new__(cls, PLACEHOLDER_MODEL if name is None else name)
        made.upstream, made.fallbacks = upstream, fallbacks
        return made


def changes_model(config: ModelConfig) -> bool:
    """Whether it says more than settings."""
    return bool(config.model or config.upstream or config.fallbacks)


def bind_model(
    table: ModelTable, model: str | None, *, upstream: str | None, default_model: str | None, pinned: str | None = None
) -> Binding:
    """Bind an agent's model; ``pinned`` is the upstream that the caller wants instead of any other, fallbacks too.

    Raises the table's own errors, whose message says how to mend it.
    """
    name = plain_name(model)
    if not isinstance(model, ChosenModel):
        return table.resolve(name, upstream=pinned or upstream, default_model=default_model)
    if pinned is not None:
        return table.resolve(name, upstream=pinned, default_model=default_model)
    return table.resolve(name, upstream=model.upstream, default_model=default_model, fallbacks=model.fallbacks)


def plain_name(model: str | None) -> str | None:
    """Return the name that an agent's model has in the configuration; None for the default one."""
    return None if model is None or model == PLACEHOLDER_MODEL else str(model)
