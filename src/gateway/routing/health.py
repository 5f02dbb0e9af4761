"""TargetHealth: one model of one upstream as routing knows it: breaker, cool-down, load, latency, retry budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from gateway.routing.budget import RetryBudget
from gateway.routing.config import BreakerRules, CooldownRules
from gateway.routing.failures import Kind

BreakerState = Literal["closed", "open", "half_open"]

_SMOOTHING = 0.2
"""Weight of the newest measurement in the mean latency."""


class BreakerWatcher(Protocol):
    """Is told when a breaker changes."""

    def breaker_changed(self, upstream: str, model: str, state: BreakerState) -> None:
        """Note the new state."""
        ...


class TargetHealth:
    """Lives as long as the process, over all reloads; used from the event loop only, so nothing is locked.

    The breaker opens after ``failures`` in a row; after ``open_s`` one call is let through as a probe, which closes it
    or opens it again. Answers that the request itself is to blame for count as successes.
    """

    __slots__ = (
        "_breaker",
        "_clock",
        "_cooldown",
        "_failures",
        "_opened_at",
        "_probing",
        "_watcher",
        "budget",
        "cool_until",
        "in_flight",
        "latency_s",
        "model",
        "state",
        "upstream",
    )

    def __init__(
        self,
        upstream: str,
        model: str,
        *,
        breaker: BreakerRules,
        cooldown: CooldownRules,
        budget: RetryBudget,
        clock: Callable[[], float],
        watcher: BreakerWatcher,
    ) -> None:
        self.upstream, self.model, self.budget = upstream, model, budget
        self.state: BreakerState = "closed"
        self.in_flight = 0
        self.latency_s: float | None = None
        self.cool_until = 0.0
        self._breaker, self._cooldown, self._clock, self._watcher = breaker, cooldown, clock, watcher
        self._failures = 0
        self._opened_at = 0.0
        self._probing = False

    def configure(self, breaker: BreakerRules, cooldown: CooldownRules, share: float) -> None:
        """Take new rules; what was learnt stays."""
        self._breaker, self._cooldown, self.budget.share = breaker, cooldown, share

    @property
    def is_open(self) -> bool:
        """Whether the breaker keeps ordinary calls away."""
        return self.state != "closed"

    @property
    def may_refuse_alone(self) -> bool:
        """Whether an open breaker refuses also where there is nobody else."""
        return self._breaker.refuse_when_alone

    def waits_s(self) -> float:
        """Return the seconds until a call is let through: 0 now."""
        if self.state == "closed" and not self.cool_until:
            return 0.0
        now = self._clock()
        wait = self.cool_until - now
        if wait <= 0:
            wait = self.cool_until = 0.0
        if self.state == "closed":
            return wait
        if self._probing:
            return max(wait, min(1.0, self._breaker.open_s))
        return max(wait, self._opened_at + self._breaker.open_s - now, 0.0)

    def begin(self) -> bool:
        """Note that a call goes out; followed by one of `succeeded`, `failed` or `abandoned`. True: it is the probe."""
        self.in_flight += 1
        if self.state == "closed" or self._probing or self._clock() - self._opened_at < self._breaker.open_s:
            return False
        self._probing = True
        self._change("half_open")
        return True

    def answered(self, seconds: float) -> None:
        """Note the time to the first byte; the call goes on."""
        old = self.latency_s
        self.latency_s = seconds if old is None else old + _SMOOTHING * (seconds - old)

    def succeeded(self) -> None:
        """Note the good end of a call."""
        self.in_flight -= 1
        self._failures = 0
        if self.state != "closed":
            self._probing = False
            self._change("closed")

    def failed(self, kind: Kind | None, retry_after_s: float | None) -> None:
        """Note the bad end of a call; ``kind`` None is the request's own fault."""
        if kind in (None, "context_length", "content_policy"):
            self.succeeded()
            return
        self.in_flight -= 1
        now = self._clock()
        if kind == "rate_limit" or retry_after_s is not None:
            rest = self._cooldown.default_s if retry_after_s is None else min(retry_after_s, self._cooldown.longest_s)
            self.cool_until = max(self.cool_until, now + rest)
        if kind == "rate_limit":
            # It is alive, only busy: the cool-down is the answer to that.
            if self.state == "half_open":
                self._probing = False
                self._change("closed")
            return
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._breaker.failures):
            self._probing = False
            self._opened_at = now
            self._change("open")

    def abandoned(self, probe: bool) -> None:
        """Note a call that the caller gave up: it says nothing about the target."""
        self.in_flight -= 1
        if probe and self.state == "half_open":
            self._probing = False
            self._change("open")

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self._watcher.breaker_changed(self.upstream, self.model, state)
