"""A chat request's fields → the SDK's model settings for the agents that answer it.

They apply to the entry agent and to agents it hands over to, not to agents used as tools; ``tool_choice`` applies to
the entry agent alone. What has no place in `ModelSettings` travels as an extra argument of the model call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agents import Agent, ModelSettings
from openai.types.shared import Reasoning

from gateway.chat import ChatRequest, JsonObjectFormat, JsonSchemaResponseFormat, NamedToolChoice
from gateway.errors import UnsupportedParameter

_PLAIN = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "parallel_tool_calls", "verbosity",
          "prompt_cache_retention", "prompt_cache_options")  # fmt: skip
_EXTRA = ("stop", "seed", "logit_bias", "safety_identifier", "prompt_cache_key", "service_tier", "prediction",
          "web_search_options", "moderation")  # fmt: skip


class RequestSettings:
    """The settings of one request, ready to be laid over those of each agent that answers it."""

    def __init__(self, request: ChatRequest, max_completion_tokens: int | None) -> None:
        self._request = request
        self._caps = [n for n in (max_completion_tokens, request.max_completion_tokens, request.max_tokens) if n]
        self._override = _override(request)
        self._response_format = _response_format(request)
        self.tool_choice = _tool_choice(request)

    def over(self, agent: Agent[Any], *, entry: bool) -> ModelSettings:
        """Return the agent's settings with the request's on top; the smallest limit of tokens wins.

        Raises `UnsupportedParameter` where the entry agent already answers in a format of its own.
        """
        own = agent.model_settings
        changes: dict[str, Any] = dict(self._override)
        caps = [*self._caps, *([own.max_tokens] if own.max_tokens else [])]
        if caps:
            changes["max_tokens"] = min(caps)
        if entry and self.tool_choice is not None:
            changes["tool_choice"] = self.tool_choice
        extra_args = {**(own.extra_args or {}), **self._extra_args()}
        if self._response_format is not None and self._formats(agent, entry=entry):
            extra_args["response_format"] = self._response_format
        if extra_args:
            changes["extra_args"] = extra_args
        if self._request.extra:
            body = own.extra_body if isinstance(own.extra_body, dict) else {}
            changes["extra_body"] = {**body, **self._request.extra}
        return replace(own, **changes) if changes else own

    def _extra_args(self) -> dict[str, Any]:
        request = self._request
        extra = {name: value for name in _EXTRA if (value := getattr(request, name)) is not None}
        user = request.user
        if isinstance(user, dict):
            # Open WebUI's form of it.
            user = next((user[name] for name in ("id", "email", "name") if user.get(name)), None)
        if user is not None:
            extra["user"] = str(user)
        return extra

    def _formats(self, agent: Agent[Any], *, entry: bool) -> bool:
        if agent.output_type is None or agent.output_type is str:
            return True
        if entry and isinstance(self._request.response_format, JsonSchemaResponseFormat):
            raise UnsupportedParameter(
                "This agent answers in a structured format of its own, so 'response_format' with a schema cannot be "
                "honoured. Leave it out.",
                param="response_format",
            )
        return False


def _override(request: ChatRequest) -> dict[str, Any]:
    changes = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None}
    if request.reasoning_effort is not None:
        # Not validated here: upstreams know efforts that this version of the client does not.
        changes["reasoning"] = Reasoning.construct(effort=request.reasoning_effort)
    return changes


def _tool_choice(request: ChatRequest) -> str | None:
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        return choice.function.name
    return choice if isinstance(choice, str) else None


def _response_format(request: ChatRequest) -> dict[str, Any] | None:
    wanted = request.response_format
    if isinstance(wanted, JsonObjectFormat):
        return {"type": "json_object"}
    if isinstance(wanted, JsonSchemaResponseFormat):
        schema = wanted.json_schema
        fields = {
            "name": schema.name,
            "schema": schema.schema,
            "description": schema.description,
            "strict": schema.strict,
        }
        return {"type": "json_schema", "json_schema": {k: v for k, v in fields.items() if v is not None}}
    return None
