"""Agents and upstreams as all workers serve them: each says how they are there, and who is asked puts it together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from api.shared import ask
from gateway.registry.entry import AgentEntry, Diagnostic, ModelConfig, Status
from gateway.upstreams.status import UpstreamStatus
from gateway.workers.workers import WorkerReply

if TYPE_CHECKING:  # the composition root imports this module
    from api.bootstrap import Gateway

_Key = tuple[str, str | None]
_WORST_FIRST: tuple[Status, ...] = ("error", "stale", "ready")


class AgentState(msgspec.Struct, frozen=True):
    """One agent in one worker; the fields are those of `AgentEntry`."""

    id: str
    namespace: str
    name: str
    display_name: str
    kind: Literal["sdk", "declarative"]
    source: Literal["file", "yaml"]
    created: int
    model: str | None
    upstream: str | None
    description: str | None
    tools: tuple[str, ...]
    aliases: tuple[str, ...]
    expose: bool
    model_config: ModelConfig | None
    status: Status
    generation: int
    content_hash: str
    file: str | None
    diagnostics: tuple[Diagnostic, ...]

    @classmethod
    def of(cls, entry: AgentEntry) -> AgentState:
        """Return what an entry says now."""
        same = {name: getattr(entry, name) for name in cls.__struct_fields__ if name not in ("expose", "diagnostics")}
        return cls(**same, expose=entry.options.expose, diagnostics=entry.list_diagnostics())


class AgentHere(msgspec.Struct, frozen=True):
    """How an agent is in one worker: not there, ``missing``; of one that did not answer, ``unknown``."""

    slot: int
    pid: int
    status: Literal["ready", "stale", "error", "missing", "unknown"]
    content_hash: str | None = None
    generation: int | None = None
    error: str | None = None


class SharedAgent(msgspec.Struct, frozen=True):
    """An agent as the worker has it where it is worst, and how it is in each; ``workers`` is empty for a lone one."""

    state: AgentState
    workers: tuple[AgentHere, ...] = ()

    @property
    def agree(self) -> bool:
        """Whether every worker serves the same content of it, in the same state."""
        return len({(here.status, here.content_hash) for here in self.workers}) <= 1


class UpstreamHere(msgspec.Struct, frozen=True):
    """What one worker knows of an upstream's health; ``error`` says why it told nothing."""

    slot: int
    pid: int
    healthy: bool | None = None
    last_checked: float | None = None
    last_error: str | None = None
    error: str | None = None


def share_states(gateway: Gateway) -> None:
    """Answer in this worker what `list_agents` and `upstream_health` ask."""

    async def agents(_: Any) -> Any:
        return msgspec.to_builtins(_agents_here(gateway))

    async def upstreams(_: Any) -> Any:
        return {name: msgspec.to_builtins(status) for name, status in _health_here(gateway).items()}

    gateway.workers.handle("agents.states", agents)
    gateway.workers.handle("upstreams.health", upstreams)


async def list_agents(gateway: Gateway) -> list[SharedAgent]:
    """Return every agent that any worker has, by id."""
    if gateway.workers.is_alone:
        return [SharedAgent(state) for state in _agents_here(gateway)]
    replies = await ask(gateway, "agents.states")
    known = {os.getpid(): _by_key(_agents_here(gateway))}
    for reply in replies:
        if reply.error is None:
            known[reply.pid] = _by_key(msgspec.convert(reply.value, list[AgentState]))
    found = []
    for key in sorted(dict.fromkeys(key for states in known.values() for key in states), key=lambda key: key[0]):
        states = [states[key] for states in known.values() if key in states]
        worst = min(states, key=lambda state: _WORST_FIRST.index(state.status))
        found.append(SharedAgent(worst, tuple(_agent_in(reply, known, key) for reply in replies)))
    return found


async def upstream_health(gateway: Gateway) -> dict[str, tuple[UpstreamStatus, tuple[UpstreamHere, ...]]]:
    """Return, by upstream, the last word of any worker about its health, and the word of each."""
    here = _health_here(gateway)
    if gateway.workers.is_alone:
        return {name: (status, ()) for name, status in here.items()}
    replies = await ask(gateway, "upstreams.health")
    told = {reply.pid: msgspec.convert(reply.value or {}, dict[str, UpstreamStatus]) for reply in replies}
    found = {}
    for name, own in here.items():
        words = [own, *(statuses[name] for statuses in told.values() if name in statuses)]
        latest = max(words, key=lambda status: status.last_checked or 0.0)
        found[name] = latest, tuple(_upstream_in(reply, told[reply.pid].get(name)) for reply in replies)
    return found


def _agents_here(gateway: Gateway) -> list[AgentState]:
    return [AgentState.of(entry) for entry in gateway.holder.current.registry.list_entries()]


def _health_here(gateway: Gateway) -> dict[str, UpstreamStatus]:
    return {name: upstream.status for name, upstream in gateway.holder.current.upstreams.upstreams.items()}


def _by_key(states: list[AgentState]) -> dict[_Key, AgentState]:
    """Return the rows as they are told apart: two files may claim one id, and both are shown."""
    return {(state.id, state.file): state for state in states}


def _agent_in(reply: WorkerReply, known: Mapping[int, Mapping[_Key, AgentState]], key: _Key) -> AgentHere:
    if reply.error is not None:
        return AgentHere(reply.slot, reply.pid, "unknown", error=reply.error)
    state = known[reply.pid].get(key)
    if state is None:
        return AgentHere(reply.slot, reply.pid, "missing")
    return AgentHere(reply.slot, reply.pid, state.status, state.content_hash, state.generation)


def _upstream_in(reply: WorkerReply, status: UpstreamStatus | None) -> UpstreamHere:
    if status is None:
        return UpstreamHere(reply.slot, reply.pid, error=reply.error or "it does not have this upstream")
    return UpstreamHere(reply.slot, reply.pid, status.healthy, status.last_checked, status.last_error)
