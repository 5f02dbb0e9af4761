"""AgentCatalogue: owns the generations of every agent, and publishes a new `Registry` whenever one of them changes."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from gateway.config import ConfigFile, Settings, reading_config
from gateway.errors import ConfigError
from gateway.observability.logs import log_event
from gateway.observability.metrics import Metrics
from gateway.registry.declarations import Declared, load_declarations
from gateway.registry.discovery import discover
from gateway.registry.entry import AgentEntry, Diagnostic
from gateway.registry.loading import AgentLoader, Declaration, DropIn, LoadedGeneration, LoadFailed
from gateway.registry.registry import Registry
from gateway.registry.slots import Slot, Source, content_hash, hash_source, is_concerned

_LOG = logging.getLogger(__name__)
_KEPT_ERRORS = 200
_PUBLISH_EVERY_S = 0.05
_VANISHED_GRACE_S = 0.15
_HANDOVER_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What one refresh did, by model id (a drop-in that failed is named by its path's id)."""

    loaded: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: int = 0
    seconds: float = 0.0


class AgentCatalogue:
    """Loads what changed, keeps the last good generation of what broke, forgets what was deleted.

    ``async with`` it; leaving gives up loads under way and releases every generation. ``publish`` gets each new
    registry, on the event loop. Nothing here is called by a request.
    """

    def __init__(
        self,
        settings: Settings,
        loader: AgentLoader,
        roots: Sequence[Path],
        *,
        publish: Callable[[Registry], None],
        metrics: Metrics | None = None,
    ) -> None:
        self._settings = settings
        self._loader = loader
        self._roots = tuple(roots)
        self._publish = publish
        self._metrics = metrics
        self._slots: dict[str, Slot] = {}
        self._file_problem: Diagnostic | None = None
        self._strangers: dict[str, Diagnostic] = {}
        self.declared_in: Mapping[str, ConfigFile] = {}
        """The file that the declared agents are from, as it was read."""
        self._declared = Declared()
        self._registry = Registry()
        self._errors: deque[Diagnostic] = deque(maxlen=_KEPT_ERRORS)
        self._rejections: frozenset[str] = frozenset()
        self._tracked: frozenset[Path] | None = None
        self._numbers = itertools.count(1)
        self._lock = asyncio.Lock()
        self._queued: _Request | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._publish_timer: asyncio.TimerHandle | None = None
        self._published_at = 0.0
        self._closing = False
        self._leaving = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._leaving.set()
        if self._publish_timer is not None:
            self._publish_timer.cancel()
        for slot in self._slots.values():
            if slot.task is not None:
                slot.task.cancel()
            if slot.loaded is not None:
                self._background(self._release(slot.loaded))
        self._slots.clear()
        while self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def registry(self) -> Registry:
        """The registry published last."""
        return self._registry

    @property
    def _namespace(self) -> str:
        return self._declared.defaults.namespace or self._settings.default_namespace

    def recent_errors(self) -> Sequence[Diagnostic]:
        """Return the last 200 diagnostics of failed loads, newest first."""
        return tuple(self._errors)

    def tracked_files(self) -> frozenset[Path]:
        """Return the files outside the roots that loaded code came from: whoever watches must watch them, too."""
        if self._tracked is None:
            files = {path for slot in self._slots.values() for path in slot.hashes if path.is_absolute()}
            self._tracked = frozenset(p for p in files if not any(map(p.is_relative_to, self._roots)))
        return self._tracked

    async def refresh(self, *, force: bool = False, paths: Collection[Path] | None = None) -> RefreshReport:
        """Look for changes by content, load them, and return when that is done.

        ``paths`` limits the look to drop-ins these files belong to (new and deleted ones are always seen). ``force``
        also tries again what failed. Calls that come while one waits are one refresh; a load that hangs does not hold
        up the next refresh.
        """
        request = self._queued
        if request is None:
            request = self._queued = _Request(force, None if paths is None else set(paths))
            request.task = self._background(self._run(request))
        else:
            request.force |= force
            request.paths = None if paths is None or request.paths is None else request.paths | set(paths)
        assert request.task is not None
        return await asyncio.shield(request.task)

    async def recheck(self) -> None:
        """Judge every agent again by the current upstreams and module policy, importing nothing that is loaded."""
        async with self._lock:
            for slot in list(self._slots.values()):
                if slot.loaded is not None:
                    self._take(slot, slot.loaded, await asyncio.to_thread(_described, slot.loaded))
        self._publish_now()
        await self.refresh(force=True)

    async def _run(self, request: _Request) -> RefreshReport:
        started = time.perf_counter()
        async with self._lock:
            self._queued = None
            plan = await self._plan(request)
            if self._closing:
                return RefreshReport()
            removed = self._remove(plan)
            tasks = [self._start(key, source, hashes) for key, source, hashes in plan.changed]
            if request.paths is None:
                tasks += [slot.task for slot in self._slots.values() if slot.task is not None]
        self._publish_now()
        running = [task for task in tasks if task is not None]
        if running:
            await asyncio.wait(running)
        changed = [self._slots[key] for key, _, _ in plan.changed if key in self._slots]
        report = RefreshReport(
            loaded=tuple(entry.id for slot in changed if not slot.problems for entry in slot.entries),
            failed=tuple(slot.source.id for slot in changed if slot.problems),
            removed=removed,
            unchanged=len(plan.sources) - len(plan.changed),
            seconds=time.perf_counter() - started,
        )
        self._publish_now()
        if self._metrics is not None:
            outcome = "failed" if report.failed else "changed" if report.loaded or removed else "unchanged"
            self._metrics.agents_refreshed(outcome, report.seconds)
        return report

    async def _plan(self, request: _Request) -> _Plan:
        known = {
            key: _Known(slot.hashes, slot.wants_retry(force=request.force, paths=request.paths or ()))
            for key, slot in self._slots.items()
        }
        plan = await asyncio.to_thread(self._scan, known, request.paths)
        if request.paths is not None and any(key not in plan.sources for key in known):
            # An editor may move the old file away before it writes the new one: look twice before letting go.
            await asyncio.sleep(_VANISHED_GRACE_S)
            plan = await asyncio.to_thread(self._scan, known, None)
        return plan

    def _scan(self, known: Mapping[str, _Known], paths: Collection[Path] | None) -> _Plan:
        """Walk and hash (in a thread): every source there is, and those that are new or not what was loaded."""
        sources: dict[str, Source] = {}
        problem: Diagnostic | None = None
        try:
            with reading_config() as reading:
                self._declared = load_declarations(self._settings)
            self.declared_in = reading.files
        except (ConfigError, OSError) as error:
            problem = _file_diagnostic(error)
        declarations, defaults, models = self._declared
        for declaration in declarations:
            sources[f"yaml:{declaration.id}"] = Source(declaration)
        for found in discover(self._roots, self._namespace):
            dropin = replace(
                found.dropin,
                default_upstream=defaults.upstream,
                default_model=defaults.model,
                model_config=tuple((id_, item) for id_, item in models.items() if found.dropin.may_publish(id_)),
            )
            sources[f"file:{dropin.file}"] = Source(dropin, found.problem)
        changed = []
        for key, source in sources.items():
            before = known.get(key)
            if (
                before is not None
                and not before.retry
                and paths is not None
                and not is_concerned(source, before.hashes, paths)
            ):
                continue
            hashes = hash_source(source, before.hashes if before is not None else {})
            if before is None or before.retry or hashes != before.hashes:
                changed.append((key, source, hashes))
        return _Plan(sources, changed, problem)

    def _remove(self, plan: _Plan) -> tuple[str, ...]:
        known = self._file_problem.message if self._file_problem is not None else None
        if plan.problem is not None and plan.problem.message != known:
            self._report(plan.problem, "agent.config.failed")
        self._file_problem = plan.problem
        removed: list[str] = []
        for key in [key for key in self._slots if key not in plan.sources]:
            slot = self._slots.pop(key)
            if slot.task is not None:
                slot.task.cancel()
            if slot.loaded is not None:
                self._background(self._release(slot.loaded))
            ids = [entry.id for entry in slot.entries] or [slot.source.id]
            removed += ids
            log_event(_LOG, "agent.dropin.removed", agents=ids, file=slot.source.label)
        return tuple(removed)

    def _start(self, key: str, source: Source, hashes: dict[Path, str]) -> asyncio.Task[None] | None:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = Slot(source.value)
        elif slot.task is not None:
            slot.task.cancel()
        slot.source, slot.hashes = source.value, hashes
        if source.problem is not None:
            self._fail(slot, (replace(source.problem, occurred_at=time.time()),))
            slot.task = None
            return None
        slot.task = self._background(self._load(slot, hashes))
        return slot.task

    async def _load(self, slot: Slot, hashes: dict[Path, str]) -> None:
        """Load one drop-in and put it in its slot, unless a newer load has taken over meanwhile."""
        me = asyncio.current_task()
        source, number, started = slot.source, next(self._numbers), time.perf_counter()
        try:
            if isinstance(source, Declaration):
                loaded = await self._loader.load_declared(source, number)
            else:
                loaded = await self._loader.load(source, number)
        except LoadFailed as failed:
            if slot.task is me:
                slot.hashes = {**hashes, **failed.files}
                self._fail(slot, failed.diagnostics)
        except Exception as error:  # noqa: BLE001 - a drop-in must not break the catalogue, whatever it does
            log_event(_LOG, "agent.dropin.error", level=logging.ERROR, exc_info=error, file=source.label)
            if slot.task is me:
                self._fail(slot, (_internal(source, error),))
        else:
            if slot.task is not me or self._closing:
                await self._release(loaded)
                return
            old, slot.loaded = slot.loaded, loaded
            slot.hashes = {**hashes, **loaded.files}
            slot.problems = ()
            if self._take(slot, loaded, _described(loaded)):
                log_event(
                    _LOG,
                    "agent.dropin.loaded",
                    agents=[entry.id for entry in slot.entries],
                    file=source.label,
                    generation=number,
                    ms=round((time.perf_counter() - started) * 1000, 1),
                )
            self._publish_soon()
            if old is not None:
                self._background(self._release(old))
        finally:
            if slot.task is me:
                slot.task = None

    def _take(self, slot: Slot, loaded: LoadedGeneration, result: tuple[AgentEntry, ...] | LoadFailed) -> bool:
        """Take over what a slot's generation says of itself; False if it cannot serve as things are now."""
        if slot.loaded is not loaded:
            return False
        if isinstance(result, LoadFailed):
            slot.entries = ()
            self._fail(slot, result.diagnostics)
            return False
        digest = content_hash(slot.hashes)
        slot.entries = tuple(replace(entry, content_hash=digest) for entry in result)
        return True

    def _fail(self, slot: Slot, diagnostics: Iterable[Diagnostic]) -> None:
        slot.problems = tuple(diagnostics)
        for item in slot.problems:
            if item.severity == "error":
                event = "agent.dropin.blocked" if item.kind == "security" else "agent.dropin.failed"
                self._report(item, event, agent_id=slot.source.id, serving=bool(slot.entries))
        self._publish_soon()

    def _report(self, item: Diagnostic, event: str, **fields: Any) -> None:
        """Remember a failure, log it, count it."""
        self._errors.appendleft(item)
        log_event(
            _LOG,
            event,
            level=logging.WARNING,
            message=f"{item.file}{f':{item.line}' if item.line else ''}: {item.message} {item.fix}",
            kind=item.kind,
            code=item.code,
            file=item.file,
            line=item.line,
            **fields,
        )
        if self._metrics is not None:
            self._metrics.dropin_failure(item.kind)

    async def _release(self, loaded: LoadedGeneration) -> None:
        """Let a generation go: after a moment, in which runs that were admitted with it begin."""
        if not self._closing:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), _HANDOVER_S)
        try:
            await loaded.release()
        except Exception as error:  # noqa: BLE001 - what an author's objects do when they are closed is theirs
            log_event(_LOG, "agent.dropin.release_failed", level=logging.WARNING, exc_info=error)

    def _publish_soon(self) -> None:
        """Publish now, or a moment later together with what else comes: each registry costs a pass over all agents."""
        if self._closing or self._publish_timer is not None:
            return
        loop = asyncio.get_running_loop()
        wait = self._published_at + _PUBLISH_EVERY_S - loop.time()
        if wait <= 0:
            self._publish_now()
        else:
            self._publish_timer = loop.call_later(wait, self._publish_now)

    def _publish_now(self) -> None:
        if self._publish_timer is not None:
            self._publish_timer.cancel()
            self._publish_timer = None
        if self._closing:
            return
        self._tracked = None
        self._published_at = asyncio.get_running_loop().time()
        self._report_strangers()
        registry = Registry.build(self._rows())
        self._report_rejections(registry)
        if registry.ordered == self._registry.ordered:
            return
        self._registry = registry
        if self._metrics is not None:
            self._metrics.agents(Counter(entry.status for entry in registry.ordered))
        self._publish(registry)

    def _rows(self) -> list[AgentEntry]:
        """Return all rows; of two with one id the first is served: YAML, then what serves longest, then errors."""
        ranked = [(slot.rank(), row) for slot in self._slots.values() for row in slot.rows()]
        rows = [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
        problems = (*([self._file_problem] if self._file_problem is not None else []), *self._strangers.values())
        if problems:
            rows.append(_file_row(problems, self._namespace))
        return rows

    def _report_strangers(self) -> None:
        """Note which entries of ``model_config`` are for agents that do not exist; a load under way may bring one."""
        slots = list(self._slots.values())
        known = {row.id for slot in slots for row in slot.entries}
        awaited = [slot.source for slot in slots if not slot.entries]
        found = {}
        for name in self._declared.model_config:
            if name in known or any(name == item.id or _may_publish(item, name) for item in awaited):
                continue
            found[name] = self._strangers.get(name) or _stranger(name, known)
            if name not in self._strangers:
                self._report(found[name], "agent.config.failed")
        self._strangers = found

    def _report_rejections(self, registry: Registry) -> None:
        seen = {f"{entry.id} {entry.file}": entry for entry in registry.rejected}
        for key, entry in seen.items():
            if key not in self._rejections:
                problem = replace(entry.diagnostics[0], occurred_at=time.time())
                self._report(problem, "agent.dropin.failed", agent_id=entry.id)
        self._rejections = frozenset(seen)

    def _background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass(frozen=True, slots=True)
class _Known:
    """What a scan needs to know of a slot."""

    hashes: dict[Path, str]
    retry: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """Every source there is, and the changed ones with the hashes of their files."""

    sources: dict[str, Source]
    changed: list[tuple[str, Source, dict[Path, str]]]
    problem: Diagnostic | None


@dataclass(eq=False, slots=True)
class _Request:
    """A refresh that has not begun; later ones join it."""

    force: bool
    paths: set[Path] | None
    task: asyncio.Task[RefreshReport] | None = None


def _may_publish(source: DropIn | Declaration, model_id: str) -> bool:
    return isinstance(source, DropIn) and source.may_publish(model_id)


def _stranger(name: str, known: Iterable[str]) -> Diagnostic:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return Diagnostic(
        kind="validation",
        code="unknown_agent",
        message=f"model_config names the agent '{name}', which there is not.",
        fix=f"{hint}Correct the id, or remove the entry; GET /agents lists all.",
        file="agents.yaml",
        occurred_at=time.time(),
    )


def _file_row(problems: tuple[Diagnostic, ...], namespace: str) -> AgentEntry:
    """Return the row that shows what is wrong with `agents.yaml`; its id is no model's."""
    name = problems[0].file
    return AgentEntry(
        id=f"{namespace}/{name}",
        namespace=namespace,
        name=name,
        display_name=name,
        kind="declarative",
        source="yaml",
        created=0,
        executor=None,
        status="error",
        file=name,
        diagnostics=problems,
    )


def _file_diagnostic(error: ConfigError | OSError) -> Diagnostic:
    message = error.message if isinstance(error, ConfigError) else f"agents.yaml: {error.strerror}"
    where = re.match(r"([^:]+\.ya?ml)(?::(\d+))?: ", message)
    return Diagnostic(
        kind="validation",
        code="invalid_config",
        message=message[where.end() :] if where else message,
        fix="Correct the file; until then its last good version stays in force.",
        file=where.group(1) if where else "agents.yaml",
        line=int(where.group(2)) if where and where.group(2) else None,
        occurred_at=time.time(),
    )


def _internal(source: DropIn | Declaration, error: Exception) -> Diagnostic:
    return Diagnostic(
        kind="import",
        code="internal_error",
        message=f"The gateway failed while it loaded this agent ({type(error).__name__}).",
        fix="See the log event agent.dropin.error; POST /agents/refresh tries again.",
        file=source.label,
        occurred_at=time.time(),
    )


def _described(loaded: LoadedGeneration) -> tuple[AgentEntry, ...] | LoadFailed:
    try:
        return tuple(loaded.describe())
    except LoadFailed as failed:
        return failed
