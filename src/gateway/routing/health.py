"""TargetHealth: one model of one upstream as routing knows it: breaker, cool-down, load, latency, retry budget."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

from gateway.routing.budget import RetryBudget
from gateway.routing.config import BreakerRules, CooldownRules
from gateway.routing.failures import Kind

BreakerState = Literal["closed", "open", "half_open"]

_SMOOTHING = 0.2
"""Weight of the newest measurement in the mean latency."""

FEWEST_TIMES = 20
"""First-byte times that must be known before a percentile of them says anything."""

_KEPT_TIMES = 128

WINDOW = 5
"""Calls that one target takes over from others at a time, before the first of them was answered."""

_PENALTY = 3
"""What a failure takes off the window: one leaves a little, the second closes it; each answer gives one back."""

_DOUBT = -4
"""The window at the least: five answers make up for any number of failures."""


class BreakerWatcher(Protocol):
    """Is told when a breaker changes."""

    def breaker_changed(self, upstream: str, model: str, state: BreakerState) -> None:
        """Note the new state."""
        ...


class TargetHealth:
    """Lives as long as the process, over all reloads; used from the event loop only, so nothing is locked.

    The breaker opens after ``failures`` in a row; after ``open_s`` one call is let through as a probe, which closes it
    or opens it again. Answers that the request itself is to blame for count as successes.

    ``standing_in`` counts calls that failed elsewhere, or are late there, and are asked here now. They come through a
    window: when all targets die at once, a hundred calls must not pass on to the next before its first answer is known.
    Each answer widens it, failures of such calls close it; what does not fit waits for an answer, or is paid for by the
    retry budget.
    """

    __slots__ = (
        "_breaker",
        "_clock",
        "_cooldown",
        "_failed_at",
        "_failures",
        "_opened_at",
        "_outcome",
        "_probing",
        "_times",
        "_watcher",
        "_window",
        "budget",
        "cool_until",
        "in_flight",
        "latency_s",
        "model",
        "standing_in",
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
        self.standing_in = 0
        self._window = WINDOW
        self._failed_at = 0.0
        self._outcome: asyncio.Event | None = None
        self._times: dict[bool, deque[float]] | None = None
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
        self.note_latency(seconds)
        if self._window < WINDOW or self.standing_in:
            self._window += 1
            self._tell()

    def note_latency(self, seconds: float) -> None:
        """Learn how long a first byte took, or was awaited in vain."""
        old = self.latency_s
        self.latency_s = seconds if old is None else old + _SMOOTHING * (seconds - old)

    def may_stand_in(self) -> bool:
        """Whether a call that failed elsewhere may be asked here at no cost."""
        if self._window <= 0 and self._clock() - self._failed_at >= self._breaker.open_s:
            self._window = 1
        return self.standing_in < self._window

    async def has_room(self) -> bool:
        """Wait while what was taken over is under way; return whether the next may come, False once one failed."""
        while not self.may_stand_in():
            if self._window <= 0 or not self.standing_in:
                return False
            if self._outcome is None:
                self._outcome = asyncio.Event()
            await self._outcome.wait()
        return True

    def stood_in(self) -> None:
        """Note that a call that was taken over has its first byte, or none to come."""
        self.standing_in -= 1
        if not self.standing_in and self._window > WINDOW:
            self._window = WINDOW
        self._tell()

    def note_time(self, seconds: float, *, streamed: bool) -> None:
        """Keep a first-byte time for `percentile`; whole answers and streams are told apart."""
        if self._times is None:
            self._times = {False: deque(maxlen=_KEPT_TIMES), True: deque(maxlen=_KEPT_TIMES)}
        self._times[streamed].append(seconds)

    def percentile(self, percent: float, *, streamed: bool) -> float | None:
        """Return the time within which so many of a hundred recent first bytes came; None while too few are known."""
        times = self._times[streamed] if self._times is not None else ()
        if len(times) < FEWEST_TIMES:
            return None
        return sorted(times)[min(int(len(times) * percent / 100), len(times) - 1)]

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
        if self.standing_in:
            self._window, self._failed_at = max(min(self._window, WINDOW) - _PENALTY, _DOUBT), now
            self._tell()
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

    def _tell(self) -> None:
        """Wake those who wait for an outcome."""
        if self._outcome is not None:
            self._outcome.set()
            self._outcome = None

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self._watcher.breaker_changed(self.upstream, self.model, state)
