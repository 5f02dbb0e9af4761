"""RoutedCall: one model call on its way from target to target until one answers."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gateway.errors import GatewayError, UpstreamUnavailable
from gateway.observability.logs import log_event
from gateway.routing.bodies import with_model
from gateway.routing.config import RetryRule, RetryRules, Strategy
from gateway.routing.failures import RETRIED, kind_of
from gateway.routing.health import BreakerWatcher
from gateway.routing.strategies import Candidate, in_order

_LOG = logging.getLogger(__name__)

Fallback = Literal["any", "context_length", "content_policy"]


class RoutingMetrics(Protocol):
    """The part of `gateway.observability.metrics.Metrics` that routing feeds."""

    def routing_attempt(self, upstream: str, outcome: str) -> None:
        """Record one try at an upstream; ``outcome`` is ``success``, ``cancelled`` or the kind of the failure."""
        ...

    def routing_retry_suppressed(self, upstream: str) -> None:
        """Count a retry that the budget did not allow."""
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
    """

    name: str
    candidates: tuple[Candidate, ...]
    retry: RetryRules
    watcher: RoutingWatcher
    chance: random.Random
    strategy: Strategy = "priority"
    fallbacks: Mapping[Fallback, tuple[Candidate, ...]] | None = None

    @property
    def model(self) -> str:
        """The model name that bodies carry."""
        return self.candidates[0].model


class RoutedCall:
    """Where one call is now. ``attempts`` counts every request that went out."""

    __slots__ = ("_fallbacks_used", "_rest", "_route", "_tried", "_tries", "attempts", "candidate", "probe")

    def __init__(self, route: Route) -> None:
        """Choose the first target; raise `UpstreamUnavailable` when all of several are resting."""
        self._route = route
        self._rest: Sequence[Candidate] = ()
        self._fallbacks_used = False
        self.attempts = 0
        self._tried: tuple[Candidate, ...] = ()
        self._tries = 0
        candidate = route.candidates[0]
        if len(route.candidates) > 1 or candidate.health.waits_s():
            candidate = self._choose()
        self.candidate = candidate

    def begin(self) -> None:
        """Note that the call goes out to `candidate`."""
        self.attempts += 1
        health = self.candidate.health
        if not self._tries:
            health.budget.earn()
        self._tries += 1
        if health.state == "closed":
            health.in_flight += 1
            self.probe = False
        else:
            self.probe = health.begin()

    def answered(self, seconds: float) -> None:
        """Note the first byte: from here on nothing is tried again."""
        self.candidate.health.answered(seconds)
        if self.attempts > 1 or len(self._route.candidates) > 1:
            log_event(
                _LOG,
                "routing.decided",
                route=self._route.name,
                upstream=self.candidate.target.name,
                upstream_model=self.candidate.model,
                attempts=self.attempts,
                strategy=self._route.strategy,
            )

    def succeeded(self) -> None:
        """Note the good end."""
        self.candidate.health.succeeded()
        self._route.watcher.metrics.routing_attempt(self.candidate.target.name, "success")

    def abandoned(self) -> None:
        """Note that the caller left."""
        self.candidate.health.abandoned(self.probe)
        self._route.watcher.metrics.routing_attempt(self.candidate.target.name, "cancelled")

    def failed(self, error: GatewayError) -> None:
        """Note a bad end after the first byte."""
        kind = kind_of(error)
        self.candidate.health.failed(kind, error.retry_after_s)
        self._route.watcher.metrics.routing_attempt(self.candidate.target.name, kind or "rejected")

    async def goes_on(self, error: GatewayError) -> bool:
        """Take a failure before the first byte: return whether `candidate` is to be asked now, after any wait."""
        self.failed(error)
        error.routed = (self.candidate.target.name, self.attempts)
        kind, health = kind_of(error), self.candidate.health
        if kind is None:
            return False
        if kind == "context_length" or kind == "content_policy":
            return self._move_on(error, self._special(kind))
        if kind in RETRIED and error.should_retry is not False and not health.waits_s():
            rule: RetryRule = getattr(self._route.retry, kind)
            if self._tries < rule.attempts:
                if health.budget.spend():
                    wait_s = rule.backoff_s * 2 ** (self._tries - 1) * (1 + self._route.chance.random() / 2)
                    await asyncio.sleep(wait_s)
                    return True
                self._route.watcher.metrics.routing_retry_suppressed(self.candidate.target.name)
        return self._move_on(error, self._rest) or self._move_on(error, self._special("any"))

    def body(self, body: bytes) -> bytes:
        """Return the body with the model's name at the present target; only what differs is rewritten."""
        if self.candidate.model == self._route.model:
            return body
        return with_model(body, self.candidate.model)

    def _choose(self) -> Candidate:
        ordered = in_order(self._route.strategy, self._route.candidates, self._route.chance)
        ready = _ready(ordered)
        if not ready:
            first = ordered[0]
            fallbacks = self._special("any")
            if len(ordered) == 1 and not fallbacks and not first.health.may_refuse_alone:
                return first
            ready = _ready(fallbacks)
        if not ready:
            wait_s = min(item.health.waits_s() for item in ordered)
            raise UpstreamUnavailable(
                f"Every upstream of '{self._route.name}' is resting after failures; try again in {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        self._rest = ready[1:]
        return ready[0]

    def _special(self, kind: Fallback) -> Sequence[Candidate]:
        """Return the fallbacks of a kind; a call falls back once."""
        if self._fallbacks_used or self._route.fallbacks is None:
            return ()
        self._fallbacks_used = True
        return self._route.fallbacks.get(kind, ())

    def _move_on(self, error: GatewayError, others: Sequence[Candidate]) -> bool:
        failed = self.candidate
        self._tried += (failed,)
        seen = {item.health for item in self._tried}
        ready = _ready([item for item in others if item.health not in seen])
        if not ready:
            return False
        self.candidate, self._rest, self._tries = ready[0], ready[1:], 0
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


def _ready(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that may be asked now, those whose last health check failed behind the others."""
    ready = [item for item in candidates if not item.health.waits_s()]
    if len(ready) > 1:
        ready.sort(key=lambda item: item.target.status.healthy is False)
    return ready
