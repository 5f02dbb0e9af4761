"""CachedExecutor: answers a relayed request from the cache, else makes one call for all that ask the same now."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import cast

from msgspec import Struct
from msgspec.structs import replace

from gateway.caching.cache import ResponseCache
from gateway.caching.config import CacheRule
from gateway.caching.directives import CacheControl
from gateway.caching.entry import Entry, is_finished, with_id
from gateway.caching.keys import answer_key, is_stored_upstream, uses_tools
from gateway.chat import CHAT_PATH, COMPLETIONS_PATH, RelayRequest
from gateway.errors import GatewayError
from gateway.events import RelayedBody, RelayedChunk, RelayedHead, RelayEnded, RunEvent, Usage
from gateway.routing.routed import RoutedUpstream
from gateway.routing.targets import Binding
from gateway.run import Executor, Run

_FREE = Usage(cost=0, cached=True)
_REASONS = frozenset({"stop", "length"})
_REASONS_WITH_TOOLS = _REASONS | {"tool_calls", "function_call"}
_ID_PREFIXES = {CHAT_PATH: "chatcmpl-", COMPLETIONS_PATH: "cmpl-"}


class Plan(Struct, frozen=True):
    """What the cache does with one request. ``key`` None: nothing, it goes to the upstream as if there were none."""

    rule: CacheRule
    control: CacheControl
    key: str | None


def plan_for(rule: CacheRule, run: Run, binding: Binding, control: CacheControl) -> Plan:
    """Judge whether a request may be answered from the cache, and by which key."""
    request = run.request
    assert isinstance(request, RelayRequest), "only relayed requests are cached"
    fields = request.fields
    refused = (
        control.no_store
        or (run.streamed and not rule.streams)
        or (uses_tools(fields) and not rule.tools)
        or is_stored_upstream(fields)
        or _takes_lent_keys(binding)
    )
    if refused:
        return Plan(rule, control, None)
    key = answer_key(
        principal=run.principal,
        sharing=rule.sharing,
        path=request.path,
        model=run.model,
        streamed=run.streamed,
        targets=_targets(binding),
        fields=fields,
    )
    return Plan(rule, control, key)


class CachedExecutor:
    """Wraps the executor of a raw model whose answers are kept."""

    def __init__(
        self, inner: Executor, binding: Binding, cache: ResponseCache, rule: CacheRule, control: CacheControl
    ) -> None:
        self._inner, self._binding, self._cache = inner, binding, cache
        self._rule, self._control = rule, control

    async def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """See `gateway.run.Executor.execute`. The head says in ``x-cache`` where the answer is from."""
        plan = plan_for(self._rule, run, self._binding, self._control)
        if plan.key is None:
            self._cache.counted(run.model, "bypass")
            events = _labelled(self._inner.execute(run), b"bypass")
        else:
            events = self._answer(run, plan, plan.key)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _answer(self, run: Run, plan: Plan, key: str) -> AsyncGenerator[RunEvent, None]:
        cache, is_fresh_wanted = self._cache, plan.control.no_cache
        entry = None if is_fresh_wanted else await cache.find(plan.rule, key, plan.control.max_age_s)
        if entry is not None:
            cache.counted(run.model, "hit")
            for event in _replayed(entry, run, cache.age_s(entry)):
                yield event
            return
        for is_last_try in (False, True):
            flight = None if is_fresh_wanted else cache.find_flight(key)
            leads = flight is None
            if flight is None:
                flight = cache.start_flight(key, self._call(run, plan, key), plan.rule.max_body_bytes)
            elif not is_last_try:
                cache.counted(run.model, "joined")
            reader, began = flight.join(), False
            try:
                async with aclosing(reader.events()) as events:
                    async for event in events:
                        is_charged = isinstance(event, RelayEnded | RelayedBody) and reader.claims_cost()
                        shown = event if leads else _shared(event, run, is_charged=is_charged)
                        if shown is not None:
                            began = True
                            yield shown
                return
            except GatewayError as error:
                # What another's call met with need not meet this one, which has not been tried by itself yet: it takes
                # over, or follows whoever did. Where the request is at fault, nothing would change.
                if leads or began or is_last_try or error.domain in ("caller", "policy"):
                    raise

    async def _call(self, run: Run, plan: Plan, key: str) -> AsyncGenerator[RunEvent, None]:
        """Yield what the upstream answers, and keep it; or what another process has fetched meanwhile."""
        cache, rule = self._cache, plan.rule
        async with cache.turn(rule, key, waits=not plan.control.no_cache) as fetched:
            if fetched is not None:
                cache.counted(run.model, "joined")
                for event in _replayed(fetched, run, cache.age_s(fetched)):
                    yield event
                return
            cache.counted(run.model, "miss")
            parts, size = list[bytes](), 0
            async with aclosing(_labelled(self._inner.execute(run), b"miss")) as events:
                async for event in events:
                    if isinstance(event, RelayedChunk | RelayedBody):
                        size += len(event.data)
                        if size <= rule.max_body_bytes:
                            parts.append(event.data)
                    yield event
                    if isinstance(event, RelayEnded | RelayedBody) and size <= rule.max_body_bytes:
                        await self._keep(rule, key, tuple(parts), event.finish_reason)

    async def _keep(self, rule: CacheRule, key: str, parts: tuple[bytes, ...], finish_reason: str) -> None:
        reasons = _REASONS_WITH_TOOLS if rule.tools else _REASONS
        if finish_reason in reasons and is_finished(parts, reasons) and self._is_first_choice():
            await self._cache.keep(rule, key, Entry(self._cache.now(), finish_reason, parts))

    def _is_first_choice(self) -> bool:
        """Whether one of the model's own targets answered: a stand-in's answer is not kept as the model's."""
        upstream = self._binding.upstream
        if not isinstance(upstream, RoutedUpstream):
            return True
        return upstream.served in {(item.target.name, item.model) for item in upstream.route.candidates}


def _takes_lent_keys(binding: Binding) -> bool:
    """Whether an answer may be of somebody's own key, for which nobody else is answered."""
    upstream = binding.upstream
    return isinstance(upstream, RoutedUpstream) and upstream.route.takes_lent_keys


def _targets(binding: Binding) -> list[tuple[str, str, str]]:
    upstream = binding.upstream
    if not isinstance(upstream, RoutedUpstream):
        return [(upstream.name, upstream.base_url, binding.model)]
    return [(item.target.name, item.target.base_url, item.model) for item in upstream.route.candidates]


async def _labelled(events: AsyncIterator[RunEvent], word: bytes) -> AsyncGenerator[RunEvent, None]:
    async with aclosing(cast("AsyncGenerator[RunEvent, None]", events)) as source:
        async for event in source:
            if isinstance(event, RelayedHead):
                event = replace(event, headers=(*event.headers, (b"x-cache", word)))
            yield event


def _replayed(entry: Entry, run: Run, age_s: float) -> Iterator[RunEvent]:
    """Give a kept answer again, under an id of its own."""
    yield _hit_head(age_s)
    if run.streamed:
        for part in entry.parts:
            yield RelayedChunk(with_id(part, _id_of(run)))
        yield RelayEnded(entry.finish_reason, _FREE)
    else:
        yield RelayedBody(with_id(entry.parts[0], _id_of(run)), entry.finish_reason, _FREE)


def _shared(event: RunEvent, run: Run, *, is_charged: bool) -> RunEvent | None:
    """Return an event of another run's call as this run shows it."""
    match event:
        case RelayedHead():
            return _hit_head(0)
        case RelayedChunk(data):
            return RelayedChunk(with_id(data, _id_of(run)))
        case RelayedBody(data, finish_reason, usage):
            return RelayedBody(with_id(data, _id_of(run)), finish_reason, usage if is_charged else _FREE)
        case RelayEnded(finish_reason, usage):
            return RelayEnded(finish_reason, usage if is_charged else _FREE)
        case _:
            return None


def _hit_head(age_s: float) -> RelayedHead:
    return RelayedHead(((b"x-cache", b"hit"), (b"age", b"%d" % age_s)))


def _id_of(run: Run) -> str:
    assert isinstance(run.request, RelayRequest), "only relayed requests are cached"
    return _ID_PREFIXES.get(run.request.path, "") + run.id.hex
