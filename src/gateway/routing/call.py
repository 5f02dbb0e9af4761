"""RoutedCall: one model call on its way from target to target until one answers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from gateway.chat import CHAT_PATH
from gateway.errors import GatewayError, LentKeyMissing, UpstreamUnavailable
from gateway.model_settings import ModelSettings
from gateway.observability.logs import log_event
from gateway.routing.bodies import with_max_tokens_as, with_model
from gateway.routing.budget import HEDGE
from gateway.routing.config import HedgeRules, RetryRule, RetryRules, Strategy
from gateway.routing.failures import ELSEWHERE, RETRIED, Kind, kind_of
from gateway.routing.health import BreakerWatcher
from gateway.routing.strategies import Candidate, in_order
from gateway.routing.targets import Target

_LOG = logging.getLogger(__name__)
NOTHING_SENT: Mapping[str, str] = MappingProxyType({})
"""The headers of credentials of a caller who lends nothing."""

_OF_THE_KEY = frozenset({"rate_limit", "refused"})
"""Kinds of failures that are another key's luck, or another account's."""

Fallback = Literal["any", "context_length", "content_policy"]


class RoutingMetrics(Protocol):
    """The part of `gateway.observability.metrics.Metrics` that routing feeds."""

    def routing_attempt(self, upstream: str, outcome: str) -> None:
        """Record one try at an upstream; ``outcome`` is ``success``, ``cancelled`` or the kind of the failure."""
        ...

    def routing_retry_suppressed(self, upstream: str) -> None:
        """Count a further try that the budget did not allow."""
        ...

    def routing_hedge(self, upstream: str, outcome: str) -> None:
        """Count a hedge by the upstream that was asked too: ``won``, ``lost``, ``failed`` or ``cancelled``."""
        ...

    def routing_breaker(self, upstream: str, model: str, state: int) -> None:
        """Set the state of a breaker: 0 closed, 1 half-open, 2 open."""
        ...


class RoutingWatcher(BreakerWatcher, Protocol):
    """Is told what routing does."""

    @property
    def metrics(self) -> RoutingMetrics:
        """Where it is counted."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """What a model name means: its candidates, who stands in for them, and how they are asked.

    ``name`` is for people. ``model`` is the name that request bodies carry when they come in: the first candidate's.
    ``settings`` are for whoever makes the body, where the request does not say.
    """

    name: str
    candidates: tuple[Candidate, ...]
    retry: RetryRules
    watcher: RoutingWatcher
    chance: random.Random
    strategy: Strategy = "priority"
    fallbacks: Mapping[Fallback, tuple[Candidate, ...]] | None = None
    hedge: HedgeRules | None = None
    settings: ModelSettings | None = None

    @property
    def model(self) -> str:
        """The model name that bodies carry."""
        return self.candidates[0].model

    @property
    def takes_lent_keys(self) -> bool:
        """Whether a caller may lend a key of its own to anyone who serves this."""
        groups = (self.candidates, *(self.fallbacks or {}).values())
        return any(item.target.config.lent_key_header is not None for group in groups for item in group)


class Try(NamedTuple):
    """A request beside the call's own, since ``began_at`` (`time.perf_counter`); ``probe``: the breaker hangs on it."""

    candidate: Candidate
    probe: bool
    began_at: float


class RoutedCall:
    """Where one call is now. ``attempts`` counts every request that went out, ``hedged`` is whether one was a hedge.

    ``lost`` is who was asked in vain beside the one that answered, and with how large a body: it may count that.
    ``sent`` are the caller's headers of credentials: keys it lends.
    """

    __slots__ = (
        "_adopted",
        "_began_at",
        "_budget",
        "_fallbacks_used",
        "_is_free",
        "_rest",
        "_route",
        "_sent",
        "_stands_in",
        "_tried",
        "_tries",
        "attempts",
        "candidate",
        "hedged",
        "lost",
        "probe",
    )

    def __init__(self, route: Route, sent: Mapping[str, str] = NOTHING_SENT) -> None:
        """Choose the first target; raise `UpstreamUnavailable` when all of several are resting.

        Raises `LentKeyMissing` where each works with a key of the caller's, and none was sent.
        """
        self._route = route
        self._sent = sent
        self._rest: Sequence[Candidate] = ()
        self._fallbacks_used = False
        self.attempts = 0
        self._tried: tuple[Candidate, ...] = ()
        self._tries = 0
        self._adopted = self._is_free = self._stands_in = self.hedged = False
        self.lost: tuple[Candidate, int] | None = None
        candidate = route.candidates[0]
        if len(route.candidates) > 1 or candidate.health.waits_s() or self._lacks_key(candidate):
            candidate = self._choose()
        self.candidate = candidate
        self._budget = candidate.health.budget

    def target(self, candidate: Candidate | None = None) -> Target:
        """Return whom to ask, with the key that the caller lends it, if any; by default `candidate`."""
        return (candidate or self.candidate).target.for_caller(self._sent)

    def is_lent(self, candidate: Candidate) -> bool:
        """Whether the caller lends a target its own key."""
        return candidate.target.config.lent_key_header in self._sent

    def kind_of(self, error: GatewayError, candidate: Candidate) -> Kind | None:
        """Return the kind of a failure; what a caller's own key met is told it, and says nothing about the target."""
        kind = kind_of(error)
        return None if kind in _OF_THE_KEY and self.is_lent(candidate) else kind

    def begin(self) -> None:
        """Note that the call goes out to `candidate`."""
        if not self.attempts:
            self._budget.earn()
        self.attempts += 1
        self._began_at = time.perf_counter()
        health = self.candidate.health
        self._tries += 1
        if health.state == "closed":
            health.in_flight += 1
            self.probe = False
        else:
            self.probe = health.begin()

    def answered(self) -> None:
        """Note the first byte: from here on nothing is tried again."""
        self.candidate.health.answered(time.perf_counter() - self._began_at)
        self._settle()
        if self._adopted:
            self._note_hedge("won")
        if self.attempts > 1 or len(self._route.candidates) > 1:
            log_event(
                _LOG,
                "routing.decided",
                route=self._route.name,
                upstream=self.candidate.target.name,
                upstream_model=self.candidate.model,
                attempts=self.attempts,
                strategy=self._route.strategy,
                hedged=self.hedged or None,
            )

    def succeeded(self) -> None:
        """Note the good end."""
        self.candidate.health.succeeded()
        self._route.watcher.metrics.routing_attempt(self.candidate.target.name, "success")

    def abandoned(self) -> None:
        """Note that the caller left."""
        self._settle()
        if self._adopted:
            self._note_hedge("cancelled")
        self.candidate.health.abandoned(self.probe)
        self._route.watcher.metrics.routing_attempt(self.candidate.target.name, "cancelled")

    def failed(self, error: GatewayError) -> None:
        """Note a bad end after the first byte."""
        kind = self.kind_of(error, self.candidate)
        self.candidate.health.failed(kind, error.retry_after_s)
        if self._is_free and kind in ELSEWHERE:
            self._budget.owe()
        self._settle()
        if self._adopted:
            self._note_hedge("failed")
        self._route.watcher.metrics.routing_attempt(self.candidate.target.name, kind or "rejected")

    def ended(self, error: BaseException | None) -> None:
        """Note how a call ended whose first byte was there: with ``error``, or well."""
        if error is None:
            self.succeeded()
        elif isinstance(error, GatewayError):
            self.failed(error)
        else:
            self.abandoned()

    async def goes_on(self, error: GatewayError) -> bool:
        """Take a failure before the first byte: return whether `candidate` is to be asked now, after any wait."""
        self.failed(error)
        error.routed = (self.candidate.target.name, self.attempts)
        kind, health = self.kind_of(error, self.candidate), self.candidate.health
        if kind is None:
            return False
        if kind == "context_length" or kind == "content_policy":
            return await self._move_on(error, self._special(kind))
        if kind in RETRIED and error.should_retry is not False and not health.waits_s():
            rule: RetryRule = getattr(self._route.retry, kind)
            if self._tries < rule.attempts:
                if self._budget.spend():
                    wait_s = rule.backoff_s * 2 ** (self._tries - 1) * (1 + self._route.chance.random() / 2)
                    await asyncio.sleep(wait_s)
                    return True
                self._route.watcher.metrics.routing_retry_suppressed(self.candidate.target.name)
        return await self._move_on(error, self._rest) or await self._move_on(error, self._special("any"))

    def hedge_after_s(self, *, streamed: bool) -> float | None:
        """Return the seconds without a first byte after which `hedge` is to be called; None: never."""
        rules = self._route.hedge
        if rules is None or self.hedged:
            return None
        if rules.percentile is None:
            return rules.after_s
        usual = self.candidate.health.percentile(rules.percentile, streamed=streamed)
        return rules.after_s if usual is None else max(usual, rules.after_s or 0.0)

    def hedge(self) -> Try | None:
        """Begin a second try beside the present one at another target, or return None where none is to be asked."""
        seen = {item.health for item in (*self._tried, self.candidate)}
        ready = [item for item in self._ready(self._rest) if item.health not in seen and not item.health.is_open]
        if not ready:
            return None
        other = ready[0]
        if not self._budget.spend(HEDGE):
            self._route.watcher.metrics.routing_retry_suppressed(other.target.name)
            return None
        self.hedged = True
        self.attempts += 1
        self._tried += (other,)
        other.health.standing_in += 1
        log_event(
            _LOG,
            "routing.hedged",
            route=self._route.name,
            upstream=self.candidate.target.name,
            next_upstream=other.target.name,
            next_upstream_model=other.model,
            attempts=self.attempts,
        )
        return Try(other, other.health.begin(), time.perf_counter())

    def beaten_by(self, hedge: Try, body_bytes: int) -> None:
        """Note that the hedge answered first: it takes the call over, and the slow target is given up."""
        slow = self.candidate
        slow.health.note_latency(time.perf_counter() - self._began_at)
        self.abandoned()
        self.lost = (slow, body_bytes)
        self.adopt(hedge)

    def adopt(self, hedge: Try) -> None:
        """Let the hedge be the call's present try: the first one is over."""
        self._tried += (self.candidate,)
        self.candidate, self.probe, self._tries = hedge.candidate, hedge.probe, 1
        self._began_at, self._adopted, self._stands_in = hedge.began_at, True, True

    def hedge_lost(self, hedge: Try, body_bytes: int) -> None:
        """Note that the hedge was in vain: the first target answered."""
        self.lost = (hedge.candidate, body_bytes)
        self._drop(hedge, "lost")

    def hedge_dropped(self, hedge: Try) -> None:
        """Note that nobody waits for the hedge any more: the caller left, or the request itself was refused."""
        self._drop(hedge, "cancelled")

    def hedge_failed(self, hedge: Try, error: GatewayError) -> None:
        """Note that the hedge failed while the first target is still awaited."""
        kind = self.kind_of(error, hedge.candidate)
        hedge.candidate.health.failed(kind, error.retry_after_s)
        hedge.candidate.health.stood_in()
        self._route.watcher.metrics.routing_attempt(hedge.candidate.target.name, kind or "rejected")
        self._route.watcher.metrics.routing_hedge(hedge.candidate.target.name, "failed")

    def body(self, path: str, body: bytes, candidate: Candidate | None = None) -> bytes:
        """Return the body as a target takes it: its name for the model, its field for the limit of tokens."""
        candidate = candidate or self.candidate
        if candidate.model != self._route.model:
            body = with_model(body, candidate.model)
        field = candidate.target.config.max_tokens_field
        return body if field is None or path != CHAT_PATH else with_max_tokens_as(body, field)

    def _choose(self) -> Candidate:
        ordered = in_order(self._route.strategy, self._route.candidates, self._route.chance)
        ready = self._ready(ordered)
        if not ready:
            first = ordered[0]
            fallbacks = self._special("any")
            usable = [item for item in (*ordered, *fallbacks) if not self._lacks_key(item)]
            if not usable:
                raise LentKeyMissing(
                    f"Whoever serves '{self._route.name}' works with its callers' own keys: send yours in the header "
                    f"'{first.target.config.lent_key_header}'."
                )
            if len(ordered) == 1 and not fallbacks and not first.health.may_refuse_alone:
                return first
            ready = self._ready(fallbacks)
        if not ready:
            wait_s = min(item.health.waits_s() for item in usable)
            raise UpstreamUnavailable(
                f"Every upstream of '{self._route.name}' is resting after failures; try again in {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        self._rest = ready[1:]
        return ready[0]

    def _lacks_key(self, candidate: Candidate) -> bool:
        """Whether a target works with keys of callers alone, and this one sent none."""
        config = candidate.target.config
        return config.allow_server_credentials == "never" and config.lent_key_header not in self._sent

    def _ready(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return those that may be asked now, those whose last health check failed behind the others."""
        ready = [item for item in candidates if not item.health.waits_s() and not self._lacks_key(item)]
        if len(ready) > 1:
            ready.sort(key=lambda item: item.target.status.healthy is False)
        return ready

    def _special(self, kind: Fallback) -> Sequence[Candidate]:
        """Return the fallbacks of a kind; a call falls back once."""
        if self._fallbacks_used or self._route.fallbacks is None:
            return ()
        self._fallbacks_used = True
        return self._route.fallbacks.get(kind, ())

    def _drop(self, hedge: Try, outcome: str) -> None:
        hedge.candidate.health.abandoned(hedge.probe)
        hedge.candidate.health.stood_in()
        metrics, name = self._route.watcher.metrics, hedge.candidate.target.name
        metrics.routing_attempt(name, "cancelled")
        metrics.routing_hedge(name, outcome)

    def _note_hedge(self, outcome: str) -> None:
        """Count the hedge that took the call over."""
        self._adopted = False
        self._route.watcher.metrics.routing_hedge(self.candidate.target.name, outcome)

    def _settle(self) -> None:
        if self._stands_in:
            self._is_free = self._stands_in = False
            self.candidate.health.stood_in()

    async def _may_ask(self, other: Candidate) -> bool:
        """Whether a call that failed elsewhere may go to another target now; waits for those that went before it."""
        health = other.health
        if not health.may_stand_in() and self._budget.spend():
            return True
        if await health.has_room():
            self._is_free = True
            return True
        self._route.watcher.metrics.routing_retry_suppressed(other.target.name)
        return False

    async def _move_on(self, error: GatewayError, others: Sequence[Candidate]) -> bool:
        failed = self.candidate
        self._tried += (failed,)
        seen = {item.health for item in self._tried}
        ready = self._ready([item for item in others if item.health not in seen])
        while ready and not await self._may_ask(ready[0]):
            ready = self._ready(ready[1:])
        if not ready:
            return False
        self.candidate, self._rest, self._tries = ready[0], ready[1:], 0
        self._stands_in = True
        ready[0].health.standing_in += 1
        log_event(
            _LOG,
            "routing.failed_over",
            level=logging.WARNING,
            message=f"'{failed.id}' failed ({type(error).__name__}); '{self.candidate.id}' is asked instead",
            route=self._route.name,
            upstream=failed.target.name,
            next_upstream=self.candidate.target.name,
            error=type(error).__name__,
            attempts=self.attempts,
        )
        return True
