"""AgentEntry: one row of the registry, and the Diagnostic that says why a row is missing or old."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.events import RunEvent
from gateway.model_settings import ModelSettings

DiagnosticKind = Literal["import", "dependency", "validation", "security"]
ClientTools = Literal["merge", "ignore", "refuse"]
StreamMode = Literal["auto", "live", "guarded"]
Status = Literal["ready", "stale", "error"]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Why a drop-in did not load, or what is odd about it: where, what, and the one thing that mends it.

    ``code`` is a stable word (``syntax_error``, ``missing_package``, ``no_export`` …; all of them stand in
    ``docs/references/diagnostics.md``). ``file`` is relative to the discovery root. ``occurred_at`` is epoch seconds.
    """

    kind: DiagnosticKind
    code: str
    message: str
    fix: str
    file: str
    line: int | None = None
    cause: str | None = None
    module: str | None = None
    severity: Literal["error", "warning"] = "error"
    occurred_at: float = 0.0


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What ``__gateway__`` or ``agents.yaml`` says about an agent; None means the gateway's default.

    ``max_depth`` to ``max_cost_usd`` hold for a run of this agent over all the agents it reaches; the settings
    ``GATEWAY_RUN_MAX_…`` where they are lower.
    """

    namespace: str | None = None
    display_name: str | None = None
    description: str | None = None
    model: str | None = None
    upstream: str | None = None
    max_turns: int | None = None
    max_tool_hops: int | None = None
    max_completion_tokens: int | None = None
    timeout_s: float | None = None
    max_depth: int | None = None
    max_model_calls: int | None = None
    max_tool_calls: int | None = None
    max_total_tokens: int | None = None
    max_cost_usd: float | None = None
    expose: bool = True
    client_tools: ClientTools | None = None
    stream_mode: StreamMode = "auto"


class ModelConfig(ModelSettings, frozen=True, kw_only=True, omit_defaults=True):
    """What the operator says of one agent's model, over what its author wrote; None leaves that as it is.

    ``upstream`` and ``model`` are as everywhere an agent names them; ``fallbacks`` are names of models that stand in.
    """

    upstream: str | None = None
    model: str | None = None
    fallbacks: tuple[str, ...] = ()


class EntryExecutor(Protocol):
    """The part of `gateway.run.Executor` a registry needs to know: it is carried, never called, here."""

    def execute(self, run: Any) -> AsyncIterator[RunEvent]:
        """See `gateway.run.Executor.execute`."""
        ...


@dataclass(frozen=True, slots=True)
class AgentEntry:
    """One agent: ready to run, serving its last good generation (``stale``), or only its error.

    ``id`` is ``namespace/slug``. ``model`` is the upstream model that the entry agent resolves to. ``created`` is
    the file's modification time in epoch seconds. ``executor`` is None exactly when ``status`` is ``error``.
    ``file`` is relative to the discovery root and shown to admins only. ``watch`` tells what is wrong at this moment
    and may mend itself, such as an MCP server that cannot be reached; `list_diagnostics` asks it. ``model_config`` is
    what the operator says of its model, which is in all that stands here.
    """

    id: str
    namespace: str
    name: str
    display_name: str
    kind: Literal["sdk", "declarative"]
    source: Literal["file", "yaml"]
    created: int
    executor: EntryExecutor | None
    upstream: str | None = None
    model: str | None = None
    description: str | None = None
    tools: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    owned_by: str = "agent-gateway"
    options: AgentOptions = field(default_factory=AgentOptions)
    model_config: ModelConfig | None = None
    status: Status = "ready"
    generation: int = 0
    content_hash: str = ""
    file: str | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    watch: Callable[[], tuple[Diagnostic, ...]] | None = field(default=None, repr=False, compare=False)

    def list_diagnostics(self) -> tuple[Diagnostic, ...]:
        """Return what the load found and what is wrong now."""
        return (*self.diagnostics, *self.watch()) if self.watch is not None else self.diagnostics
