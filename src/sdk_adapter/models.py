"""Which upstream an agent's model name means, and what the gateway adds to every model call of a run.

`GatewayProvider` is the SDK's `ModelProvider`: it sees every model name (or None) of every agent of a run, handoff
targets and agents used as tools included. `GatewayModel` stands around each model: it counts calls and tool hops,
forces usage, removes settings that were meant for another model, and stops a structured answer that was cut.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from agents import Model, ModelBehaviorError, ModelProvider, ModelResponse, ModelSettings, Tool
from agents.agent_output import AgentOutputSchemaBase
from agents.handoffs import Handoff
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.models.default_models import get_default_model_settings, gpt_5_reasoning_settings_required
from agents.models.interface import ModelTracing
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel
from agents.retry import ModelRetryAdvice, ModelRetryAdviceRequest
from agents.usage import Usage as SdkUsage
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from gateway.chat import ChatRequest, FunctionMessage
from gateway.errors import AgentFailed, ConfigError, UnsupportedParameter, UnsupportedValue, UpstreamMalformed
from gateway.events import FinishReason, Usage
from gateway.model_settings import ModelSettings as OperatorSettings
from gateway.routing.routed import RoutedUpstream
from sdk_adapter.clients import UpstreamClient
from sdk_adapter.model_choice import PLACEHOLDER_MODEL, bind_model
from sdk_adapter.scope import Level, current_level

if TYPE_CHECKING:
    from gateway.routing.targets import ModelTable, Target

_RESPONSES_FIELDS = frozenset(ResponseCreateParamsNonStreaming.__annotations__)

_CHAT_ONLY = (
    "frequency_penalty",
    "logit_bias",
    "prediction",
    "presence_penalty",
    "seed",
    "stop",
    "web_search_options",
)
"""Request fields that the Responses surface does not have."""


class AnswerCut(ModelBehaviorError):
    """A structured answer ended early (``length`` or ``content_filter``): it cannot be parsed, only shown."""

    def __init__(self, finish_reason: FinishReason, text: str) -> None:
        super().__init__(f"The model's structured answer was cut: {finish_reason}.")
        self.finish_reason = finish_reason
        self.text = text


class GatewayProvider(ModelProvider):
    """Resolves names through the upstream table of the current run; outside of any run, through the current table."""

    def __init__(self, upstreams: Callable[[], ModelTable]) -> None:
        self._upstreams = upstreams

    def get_model(self, model_name: str | None) -> Model:
        """Return the model for an agent's model name.

        Raises the table's own errors (`UnknownModel`, `UnknownUpstream`), whose message says how to mend it.
        """
        level = current_level()
        if level is None:
            binding = bind_model(self._upstreams(), model_name, upstream=None, default_model=None)
            upstream = binding.upstream
        else:
            scope = level.scope
            try:
                binding = bind_model(
                    scope.table,
                    model_name,
                    upstream=scope.upstream,
                    default_model=scope.default_model,
                    pinned=scope.run.upstream,
                )
            except ConfigError as error:
                if scope.run.upstream is None:
                    raise
                raise UnsupportedValue(f"'x-gateway-upstream' cannot be honoured: {error.message}") from error
            upstream = scope.served_by = binding.upstream.for_caller(scope.run.caller.sent)
        return bound_model(upstream, binding.model, None if model_name == PLACEHOLDER_MODEL else model_name, level)


def bound_model(upstream: Target, model: str, requested: str | None, level: Level | None) -> GatewayModel:
    """Return the SDK model that calls ``model`` of an upstream; ``requested`` is the name the agent's author wrote."""
    client = UpstreamClient(upstream, level)
    inner: Model
    if upstream.api == "responses":
        if level is not None and level.depth == 0:
            _refuse_chat_only(level)
        inner = OpenAIResponsesModel(model, cast(Any, client))
    else:
        inner = OpenAIChatCompletionsModel(model, cast(Any, client))
    renamed = requested if requested is not None and requested.rpartition("/")[2] != model else None
    filled = upstream.route.settings if isinstance(upstream, RoutedUpstream) else None
    return GatewayModel(inner, level, client=client, renamed_from=renamed, bound_to=model, settings=filled)


class GatewayModel(Model):
    """A model call of a run, counted and bounded; ``client`` is None around a model that the author brought.

    ``settings`` are the operator's for the model's name: they hold where neither request nor agent says anything.
    """

    def __init__(
        self,
        inner: Model,
        level: Level | None,
        *,
        client: UpstreamClient | None = None,
        renamed_from: str | None = None,
        bound_to: str = "",
        settings: OperatorSettings | None = None,
    ) -> None:
        self._filled = settings.given() if settings is not None else {}
        self.inner = inner
        self._level = level
        self._client = client
        self._renamed_from = renamed_from
        self._bound_to = bound_to

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        **state: Any,
    ) -> ModelResponse:
        """Call the model and wait for the whole answer."""
        level = self._begin()
        with self._malformed():
            response = await self.inner.get_response(
                system_instructions,
                input,
                self._settings(model_settings),
                self._offered(tools),
                output_schema,
                handoffs,
                tracing,
                **state,
            )
        if self._client is None and level is not None:
            level.scope.add_usage(usage_of_sdk(response.usage))
        self._end(level, response.output, output_schema, handoffs)
        return response

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        **state: Any,
    ) -> AsyncGenerator[TResponseStreamEvent, None]:
        """Call the model and yield its events as they come."""
        level = self._begin()
        stream = self.inner.stream_response(
            system_instructions,
            input,
            self._settings(model_settings),
            self._offered(tools),
            output_schema,
            handoffs,
            tracing,
            **state,
        )
        source = aclosing(cast("AsyncGenerator[TResponseStreamEvent, None]", stream))
        with self._malformed():
            async with source as events:
                async for event in events:
                    if event.type == "response.completed":
                        if self._client is None and level is not None and event.response.usage is not None:
                            usage = event.response.usage
                            level.scope.add_usage(Usage(usage.input_tokens, usage.output_tokens, requests=1))
                        self._end(level, event.response.output, output_schema, handoffs)
                    yield event

    def get_retry_advice(self, request: ModelRetryAdviceRequest) -> ModelRetryAdvice | None:
        """Pass on the inner model's advice, for authors who configured retries."""
        return self.inner.get_retry_advice(request)

    async def close(self) -> None:
        """Close the inner model."""
        await self.inner.close()

    async def _cleanup_on_run_end(self, owner: object) -> None:
        await self.inner._cleanup_on_run_end(owner)

    def _begin(self) -> Level | None:
        level = current_level()
        if level is not None:
            level.scope.budget.count_model_call()
            level.finish_reason = None
        return level

    @contextmanager
    def _malformed(self) -> Iterator[None]:
        """Say of an answer at which the SDK stumbles that the upstream is to blame, and not the agent."""
        record = self._client.record if self._client is not None else None
        if record is not None:
            record.heard = False
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if record is None or not record.heard:
                raise
            raise UpstreamMalformed("The upstream's answer is not what its protocol allows.") from error

    def _settings(self, settings: ModelSettings) -> ModelSettings:
        changes: dict[str, Any] = {
            name: value for name, value in self._filled.items() if getattr(settings, name) is None
        }
        if self._renamed_from is not None and not gpt_5_reasoning_settings_required(self._bound_to):
            implicit = get_default_model_settings(self._renamed_from)
            asked = self._request()
            for name, wanted in (("reasoning", "reasoning_effort"), ("verbosity", "verbosity")):
                value = getattr(implicit, name)
                if value is not None and value == getattr(settings, name) and getattr(asked, wanted, None) is None:
                    changes[name] = None
        return replace(settings, **changes) if changes else settings

    def _request(self) -> ChatRequest | None:
        if self._level is None or self._level.depth:
            return None
        request = self._level.scope.run.request
        return request if isinstance(request, ChatRequest) else None

    def _offered(self, tools: list[Tool]) -> list[Tool]:
        if self._level is None or self._level.scope.max_tool_hops != 0:
            return tools
        return [tool for tool in tools if tool.name in self._level.client_tools]

    def _end(
        self, level: Level | None, output: list[Any], schema: AgentOutputSchemaBase | None, handoffs: list[Handoff]
    ) -> None:
        calls = [item.name for item in output if item.type == "function_call"]
        reason = self._client.record.finish_reason if self._client is not None else None
        if reason in ("length", "content_filter") and not calls and schema is not None and not schema.is_plain_text():
            raise AnswerCut(cast(FinishReason, reason), output_text(output))
        if level is None or level.depth or level.scope.max_tool_hops is None:
            return
        not_hops = {*level.client_tools, *(handoff.tool_name for handoff in handoffs)}
        if any(name not in not_hops for name in calls):
            level.tool_hops += 1
            if level.tool_hops > level.scope.max_tool_hops:
                raise AgentFailed(
                    f"The agent asked for tools more often than its limit of {level.scope.max_tool_hops} "
                    "('max_tool_hops') allows, so the run was stopped."
                )


def output_text(output: list[Any]) -> str:
    """Return the text of a model answer's message items."""
    parts = (part for item in output if item.type == "message" for part in item.content)
    return "".join(part.text for part in parts if part.type == "output_text")


def usage_of_sdk(usage: SdkUsage) -> Usage:
    """Translate the SDK's usage of one model call."""
    return Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_input_tokens=usage.input_tokens_details.cached_tokens or 0,
        reasoning_tokens=usage.output_tokens_details.reasoning_tokens or 0,
        requests=max(usage.requests, 1),
    )


def _refuse_chat_only(level: Level) -> None:
    request = level.scope.run.request
    if not isinstance(request, ChatRequest):
        return
    for name in _CHAT_ONLY:
        if getattr(request, name) is not None:
            raise UnsupportedParameter(
                f"'{name}' cannot be honoured here: this agent's upstream speaks the Responses API, which has no such "
                "field. Leave it out, or have the upstream's 'api' set to 'chat'.",
                param=name,
            )
    for name in request.extra:
        if name in _RESPONSES_FIELDS:
            # In this upstream's language it would replace what the agent's author decided.
            raise UnsupportedParameter(f"'{name}' is not a field of a chat completion. Leave it out.", param=name)
    for index, message in enumerate(request.messages):
        if getattr(message, "name", None) is not None and not isinstance(message, FunctionMessage):
            raise UnsupportedParameter(
                f"messages[{index}].name cannot be honoured here: this agent's upstream speaks the Responses API, "
                "which knows no names of participants. Leave it out.",
                param=f"messages[{index}].name",
            )
