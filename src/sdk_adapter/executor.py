"""AgentExecutor: one admitted run → one SDK run → RunEvents.

`prepare_agent` looks at an agent once per load and instruments it; every request then works on clones. See
`sdk_adapter.translation` for what becomes an event, `sdk_adapter.failures` for what becomes an error.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from agents import Agent, RunConfig, Runner, RunResult, RunResultStreaming
from agents.items import ToolApprovalItem
from agents.stream_events import StreamEvent

from gateway.chat import ChatRequest
from gateway.config import Settings
from gateway.errors import GatewayError, ServiceUnavailable
from gateway.events import FinishReason, RunEvent, RunFinished
from gateway.limits.rules import nanodollars_of
from gateway.limits.run_budget import RunBudget, RunCaps
from gateway.observability.logs import log_context, log_event
from gateway.registry.entry import AgentOptions
from gateway.routing.routed import RoutedUpstream
from gateway.run import Run
from gateway.usage.prices import PICO
from sdk_adapter.client_tools import ClientTool, TurnMemory, client_tools_of, fitting_tools
from sdk_adapter.cloning import RunClones, as_configured
from sdk_adapter.containment import is_stopped, raise_if_cancelled
from sdk_adapter.context import GatewayContext
from sdk_adapter.failures import EarlyEnd, as_gateway_error, early_end, root_cause
from sdk_adapter.gateway_tools import bound_tools, require_tools
from sdk_adapter.guarding import Gate, InputVerdict
from sdk_adapter.instrument import AS_WRITTEN, Survey, observe_tools, survey
from sdk_adapter.mcp_servers import McpServers, shown_name
from sdk_adapter.messages import Item, items_of
from sdk_adapter.models import GatewayProvider
from sdk_adapter.request_settings import RequestSettings
from sdk_adapter.scope import MODEL_CALLS_PER_TURN, Level, RunScope, ToolStatus, enter_level
from sdk_adapter.services import AdapterServices
from sdk_adapter.tracing import content_is_wanted, nobody_listens
from sdk_adapter.translation import EventTranslator

__all__ = ["AdapterServices", "AgentExecutor", "PreparedAgent", "prepare_agent"]

_log = logging.getLogger("gateway.sdk_agent")

_NOTHING: Mapping[int, str] = {}
_CLOSE_S = 5.0
"""How long a cancelled run may take to put its things away."""


@dataclass(frozen=True, slots=True)
class PreparedAgent:
    """An agent ready to run, and what the loader judges it by.

    ``model`` is the entry agent's: None is the default one, or one that its author brought. ``models`` holds every
    reachable agent's name with the model name it runs with (None: the default).
    ``hosted_tools`` need an upstream that serves them; ``host_tools`` would act on the gateway's machine.
    ``duplicate_tools`` and ``gateway_tools`` (those of `tools.yaml`) are pairs of agent and tool name, ``problems`` of
    agent and a mistake that fails every run.
    ``tools`` are those of the entry agent.
    """

    executor: AgentExecutor
    tools: tuple[str, ...]
    model: str | None
    models: tuple[tuple[str, str | None], ...]
    hosted_tools: tuple[tuple[str, str], ...]
    host_tools: tuple[tuple[str, str], ...]
    brings_own_model: tuple[str, ...]
    duplicate_tools: tuple[tuple[str, str], ...]
    gateway_tools: tuple[tuple[str, str], ...]
    output_guardrails: bool
    mcp_servers: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]


def prepare_agent(
    agent: Any,
    *,
    agent_id: str,
    options: AgentOptions,
    services: AdapterServices,
    published: Mapping[int, str] = _NOTHING,
    configured: Mapping[int, Agent[Any]] = AS_WRITTEN,
) -> PreparedAgent:
    """Instrument an agent and everything it reaches, in place, and return what will execute it.

    ``published`` has the model ids of all agents of the drop-in, by the `id` of the object; ``configured`` those of
    them, by the same, that run otherwise than they were written.
    Raises `TypeError` for what is not an SDK agent. Connects to nothing: `AgentExecutor.open` does.
    """
    if not isinstance(agent, Agent):
        raise TypeError(f"expected an agents.Agent, got {type(agent).__name__}")
    entry = configured.get(id(agent)) or as_configured(agent, options, None)
    seen = survey(entry, configured)
    executor = AgentExecutor(
        agent,
        entry,
        agent_id=agent_id,
        options=options,
        services=services,
        seen=seen,
        published=published,
        configured=configured,
    )
    return PreparedAgent(
        executor=executor,
        tools=tuple(tool.name for tool in entry.tools),
        model=entry.model if isinstance(entry.model, str) else None,
        models=seen.models,
        hosted_tools=seen.hosted_tools,
        host_tools=seen.host_tools,
        brings_own_model=seen.brings_own_model,
        duplicate_tools=seen.duplicate_tools,
        gateway_tools=seen.gateway_tools,
        output_guardrails=seen.output_guardrails,
        mcp_servers=tuple(shown_name(server) for server in seen.mcp_servers),
        problems=seen.problems,
    )


class AgentExecutor:
    """Executes runs of one load of one agent (`gateway.run.Executor`)."""

    def __init__(
        self,
        agent: Agent[Any],
        entry: Agent[Any],
        *,
        agent_id: str,
        options: AgentOptions,
        services: AdapterServices,
        seen: Survey,
        published: Mapping[int, str] = _NOTHING,
        configured: Mapping[int, Agent[Any]] = AS_WRITTEN,
    ) -> None:
        self._published, self._configured = published, configured
        self._agent, self._entry = agent, entry
        self._agent_id, self._options, self._services = agent_id, options, services
        self._max_turns = options.max_turns or services.settings.agent_max_turns
        self._caps = _caps(services.settings, options, self._max_turns)
        self._must_guard = seen.output_guardrails
        self._guarded = options.stream_mode == "guarded" or (options.stream_mode == "auto" and seen.output_guardrails)
        self._provider = GatewayProvider(services.upstreams)
        self._turns = TurnMemory()
        self._mcp = McpServers(seen.mcp_servers, agent_id=agent_id)
        self._reached, self._needs_tools = seen.agents, bool(seen.gateway_tools)
        self._running = 0
        self._idle = asyncio.Event()
        self._closed = False
        for reached in seen.agents:
            observe_tools(reached)

    async def open(self) -> None:
        """Start connecting the agent's MCP servers; a server that cannot be reached fails only runs that need it."""
        await self._mcp.open()

    async def aclose(self) -> None:
        """Wait for the last run, then close what this load of the agent holds open."""
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        self._closed = True
        await self._mcp.aclose()

    async def execute(self, run: Run) -> AsyncGenerator[RunEvent, None]:
        """Yield the run's events; raise `GatewayError` on failure; stop all work when closed or cancelled."""
        request = run.request
        if not isinstance(request, ChatRequest):
            raise TypeError("an agent answers chat requests only")
        with self._lease():
            answer = self._answer(run, request)
            async with aclosing(answer.events()) as events:
                async for event in events:
                    yield event

    def mcp_failures(self) -> dict[str, str]:
        """Return why MCP servers of the agent are not connected, by name."""
        return self._mcp.failures()

    @contextmanager
    def _lease(self) -> Iterator[None]:
        if self._closed:
            raise ServiceUnavailable("The agent was reloaded as this request began; send it again.", retry_after_s=0)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _answer(self, run: Run, request: ChatRequest) -> _Answer:
        """Judge the request against this agent; everything that can be refused is refused here."""
        tools = client_tools_of(request, self._options.client_tools, run.principal)
        if self._needs_tools and self._services.tools is not None:
            require_tools(self._reached, self._services.tools, run.principal, run.model)
        scope = RunScope(
            run=run,
            table=self._services.upstreams(),
            loop=asyncio.get_running_loop(),
            budget=RunBudget(
                self._caps,
                run.reservation,
                output_tokens=self._services.settings.reserved_output_tokens,
                deadline_s=run.deadline_s,
            ),
            observe=functools.partial(self._observe, run),
            upstream=run.upstream or self._options.upstream,
            default_model=self._options.model,
            max_tool_hops=self._options.max_tool_hops,
            meter=self._services.meter(),
            tools=self._services.tools,
            access=self._services.access(),
            hides_foreign_models=self._services.hides_foreign_models(),
            decided=self._services.metrics.access_decided,
            published=self._published,
            configured=self._configured,
        )
        level = Level(scope, client_tools=frozenset(tool.name for tool in tools))
        settings = RequestSettings(request, self._options.max_completion_tokens)
        waits = self._options.stream_mode == "auto" and run.streamed and not self._guarded
        verdict = InputVerdict(self._entry.input_guardrails if waits else [])

        def customise(agent: Agent[Any]) -> dict[str, Any]:
            return self._changes(agent, level, settings, tools, verdict)

        clones = RunClones(level, customise)
        items = items_of(request.messages, self._turns.of(run.principal.key_id))
        scope.call_ids.update(item["call_id"] for item in items if item.get("type") == "function_call")
        entry = clones.clone_of(self._entry)
        clones.treat_alike(self._agent, entry)
        return _Answer(
            run=run,
            level=level,
            entry=entry,
            items=items,
            max_turns=self._max_turns,
            config=RunConfig(
                model_provider=self._provider,
                workflow_name=self._agent_id,
                group_id=run.session_id,
                trace_metadata={"request_id": run.request_id, "run_id": run.id.hex},
                trace_include_sensitive_data=content_is_wanted(),
                tracing_disabled=nobody_listens(),
                tool_not_found_behavior="return_error_to_model",
            ),
            gate=Gate(guarded=self._guarded, verdict=verdict),
            must_guard=self._must_guard,
            turns=self._turns,
            services=self._services,
        )

    def _changes(
        self,
        agent: Agent[Any],
        level: Level,
        settings: RequestSettings,
        tools: tuple[ClientTool, ...],
        verdict: InputVerdict,
    ) -> dict[str, Any]:
        entry = agent is self._entry
        changes: dict[str, Any] = {"model_settings": settings.over(agent, entry=entry)}
        if fitting := fitting_tools(tools, agent):
            changes["tools"] = [*bound_tools(agent.tools, level), *fitting]
        if entry and settings.tool_choice is not None:
            # Without the reset, a forced tool would be called again in every turn.
            changes["reset_tool_choice"] = True
        if entry and verdict.pending:
            changes["input_guardrails"] = verdict.watched
        return changes

    def _observe(self, run: Run, tool: str, provider: str, agent: str, status: ToolStatus, seconds: float) -> None:
        self._services.metrics.tool_invoked(tool, provider, "sdk", status, seconds)
        log_event(
            _log,
            "tool.invoke",
            level=logging.INFO if status == "success" else logging.WARNING,
            tool_name=tool,
            source="sdk",
            provider=provider,
            status=status,
            agent=agent,
            agent_id=self._agent_id,
            run_id=run.id.hex,
            key_id=run.principal.key_id,
            duration_ms=round(seconds * 1000, 2),
        )


@dataclass(slots=True)
class _Answer:
    """One request being answered."""

    run: Run
    level: Level
    entry: Agent[Any]
    items: list[Item]
    max_turns: int
    config: RunConfig
    gate: Gate
    must_guard: bool
    turns: TurnMemory
    services: AdapterServices

    async def events(self) -> AsyncGenerator[RunEvent, None]:
        """Yield the events of the run, `RunFinished` last; log how it went."""
        name = "sdk_agent.stream" if self.run.streamed else "sdk_agent"
        started = time.perf_counter()
        first = True
        if (line := log_context()) is not None:
            line.agent_id = self.run.model
        log_event(_log, f"{name}.start", **self._log_fields())
        try:
            async with aclosing(self._streamed() if self.run.streamed else self._whole()) as events:
                async for event in events:
                    if first:
                        first = False
                        served_by = self.level.scope.served_by
                        if isinstance(served_by, RoutedUpstream) and served_by.decision is not None:
                            yield served_by.decision
                    yield event
            log_event(_log, f"{name}.success", duration_ms=_since(started), **self._log_fields())
        except BaseException as error:
            if is_stopped(error):
                raise
            shown = as_gateway_error(error, self.run.model)
            self._log_failure(f"{name}.failure", error, shown, _since(started))
            if shown is error:
                raise
            raise shown from error
        finally:
            self.level.scope.finished = True

    async def _whole(self) -> AsyncGenerator[RunEvent, None]:
        translator = EventTranslator(self.level.client_tools)
        try:
            with enter_level(self.level):
                result = await Runner.run(self.entry, cast(Any, self.items), **self._arguments())
        except Exception as error:
            end = early_end(error)
            if end is None:
                raise
            for event in self._ended(end, translator):
                yield event
            return
        for event in translator.whole(result):
            yield event
        yield self._finished(result)

    async def _streamed(self) -> AsyncGenerator[RunEvent, None]:
        translator = EventTranslator(self.level.client_tools)
        with enter_level(self.level):
            result = Runner.run_streamed(self.entry, cast(Any, self.items), **self._arguments())
        try:
            async with aclosing(cast("AsyncGenerator[StreamEvent, None]", result.stream_events())) as stream:
                try:
                    async for item in stream:
                        for event in translator.feed(item):
                            for passed in self.gate.put(event):
                                yield passed
                except (GeneratorExit, asyncio.CancelledError):
                    # Before the stream is closed: closing it alone would wait for the run to end.
                    result.cancel()
                    raise
            if result.run_loop_exception is not None:
                raise result.run_loop_exception
            raise_if_cancelled(result.run_loop_task)  # the SDK's stream just ends
        except Exception as error:
            end = early_end(error)
            if end is None:
                raise
            if not self.must_guard:
                for event in self.gate.open():
                    yield event
            for event in self._ended(end, translator, streamed=True):
                yield event
            return
        finally:
            await _stopped(result)
        rest = list(translator.rest(result))
        for event in (*self.gate.open(), *rest):
            yield event
        yield self._finished(result)

    def _arguments(self) -> dict[str, Any]:
        return {
            "context": GatewayContext.of(self.run),
            "max_turns": self.max_turns,
            "run_config": self.config,
        }

    def _ended(self, end: EarlyEnd, translator: EventTranslator, *, streamed: bool = False) -> Iterator[RunEvent]:
        """Say what may still be said of an answer that ended early; what no guardrail has judged is not."""
        if not streamed and not self.must_guard:
            yield from translator.partial(list(end.items))
            yield from translator.text(end.text or "")
        if end.refusal and not translator.refused:
            yield translator.refusal(end.refusal)
        yield RunFinished(end.finish_reason, self._usage())

    def _finished(self, result: RunResult | RunResultStreaming) -> RunFinished:
        reason: FinishReason = "stop"
        if result.interruptions:
            reason = "tool_calls"
            self._keep_turn(result)
        elif self.level.finish_reason in ("length", "content_filter"):
            reason = self.level.finish_reason
        return RunFinished(reason, self._usage())

    def _keep_turn(self, result: RunResult | RunResultStreaming) -> None:
        items = [item.to_input_item() for item in result.new_items if not isinstance(item, ToolApprovalItem)]
        kept = cast("list[Item]", items)
        if any(item.get("type") != "function_call" and item.get("type") != "message" for item in kept):
            call_ids = [str(getattr(item.raw_item, "call_id", "")) for item in result.interruptions]
            self.turns.keep(self.run.principal.key_id, call_ids, kept)

    def _usage(self) -> Any:
        scope = self.level.scope
        return scope.usage if scope.budget.model_calls else None

    def _log_fields(self) -> dict[str, Any]:
        return {"run_id": self.run.id.hex, "agent_id": self.run.model}

    def _log_failure(self, event: str, error: BaseException, shown: GatewayError, duration_ms: float) -> None:
        usage = self.level.scope.usage
        own = shown is error
        if usage.requests:
            # The run has no RunFinished to carry it: what was used is still counted.
            self.services.metrics.tokens(self.run.model, usage.input_tokens, usage.output_tokens)
        log_event(
            _log,
            event,
            level=logging.WARNING if own or shown.domain == "caller" else logging.ERROR,
            duration_ms=duration_ms,
            error_code=shown.code,
            error_type=type(root_cause(error)).__name__,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cost_usd=usage.cost / PICO if usage.cost is not None else None,
            exc_info=None if own else error,
            **self._log_fields(),
        )


async def _stopped(result: RunResultStreaming) -> None:
    """Return when the SDK's tasks of a streamed run have ended, cancelling them if the run is not complete."""
    task = result.run_loop_task
    if task is None or task.done():
        return
    if not result.is_complete:
        result.cancel()
    await asyncio.wait((task,), timeout=_CLOSE_S)


def _caps(settings: Settings, options: AgentOptions, max_turns: int) -> RunCaps:
    """Return the lower of what the settings and the agent say; ten model calls a turn where neither says how many."""
    usual = max_turns * MODEL_CALLS_PER_TURN if options.max_model_calls is None else sys.maxsize
    shared = RunCaps(
        depth=settings.run_max_depth,
        model_calls=settings.run_max_model_calls or usual,
        tool_calls=settings.run_max_tool_calls,
        tokens=settings.run_max_tokens,
        nanodollars=nanodollars_of(settings.run_max_cost_usd),
    )
    return shared.lowered(
        depth=options.max_depth,
        model_calls=options.max_model_calls,
        tool_calls=options.max_tool_calls,
        tokens=options.max_total_tokens,
        nanodollars=None if options.max_cost_usd is None else nanodollars_of(options.max_cost_usd),
    )


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 2)
