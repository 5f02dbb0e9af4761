"""Limiter: who may go on, and what it costs them; one per process, over counters of its own or shared ones.

A shared store is asked in batches, one exchange at a time: whoever comes while one is under way shares the next. What
was leased in a block is used without asking. While the store is down, speed limits are open and cost limits closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn, TypeVar

from msgspec import Struct

from gateway.errors import BudgetExhausted, GatewayError, RateLimited, ServiceUnavailable
from gateway.limits.accounts import Account, Standing, duration
from gateway.limits.memory import MemoryLimits
from gateway.limits.port import Answer, Batch, Change, Grant, LimitStore, LimitStoreDown, Refusal, Renewal, Rule
from gateway.limits.reservation import NOTHING, OF_CALLS, Estimate, Part, Reservation, wants_of
from gateway.limits.rules import NANO, Counted, Measure, Scope, counted, end_user_name
from gateway.observability.logs import log_event
from gateway.observability.metrics import Metrics
from gateway.principal import Allowance, Principal

Spent = Callable[[Counted, int], None]
"""Told what was really spent of a budget in its window, in nanodollars."""

_log = logging.getLogger("gateway.limits")

_ANSWER_S = 5.0
"""Seconds a store may take for an exchange; its own library gives up earlier where nobody is there."""
_FIRST_ANSWER_S = 15.0
"""The first exchange opens the store: SQLAlchemy, the schema."""
_DOWN_S = 1.0
"""Seconds after a failed exchange in which nobody waits for another."""
_TICK_S = 1.0
_CLOSE_S = 3.0
_RENEW_S = 10.0
_MOST_GROUPS = 256
_MOST_CHANGES = 50_000
_MOST_PLANS = 10_000
_NO_ANSWER = Answer(())
_WHOSE: dict[Scope, str] = {
    "key": "the key '{}'",
    "namespace": "all keys in the namespace of the key '{}' together",
    "end_user": "each end user of the key '{}'",
}

Want = tuple[Account, int]
K = TypeVar("K")


class _Waiting(Struct):
    wants: Sequence[Want]
    future: asyncio.Future[tuple[Grant, ...] | Refusal]


class _Plan(Struct):
    """The accounts of one key, or of one end user of it.

    ``of_calls`` are those that model calls use, ``of_runs`` those of runs under way, ``told`` those that clients are
    told of. ``wants`` is what a run takes where no model call is weighed.
    """

    allowance: Allowance
    accounts: tuple[Account, ...]
    of_calls: tuple[Account, ...]
    of_runs: tuple[Account, ...]
    told: tuple[Account, ...]
    wants: list[Want]


class Limiter:
    """Admits runs and their model calls. Use inside ``async with``, from one event loop."""

    def __init__(self, store: LimitStore, metrics: Metrics, *, on_spent: Spent | None = None) -> None:
        self._store = store
        self._memory = store if isinstance(store, MemoryLimits) else None
        self._metrics = metrics
        self._on_spent = on_spent
        self._holder = os.urandom(8).hex()
        self._accounts: dict[str, Account] = {}
        self._plans: dict[str, _Plan] = {}
        self._user_plans: dict[tuple[str, str], _Plan] = {}
        self._waiting: list[_Waiting] = []
        self._changes: list[Change] = []
        self._spending: dict[str, tuple[Counted, int]] = {}
        self._wake = asyncio.Event()
        self._down_until = 0.0
        self._is_down = False
        self._renew_at = 0.0
        self._pump: asyncio.Task[None] | None = None
        self._is_closing = False
        self._has_answered = False

    async def __aenter__(self) -> Limiter:
        self._pump = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pump is not None, "entered"
        # Asked, not cancelled: an exchange that is cut off may count what nobody ever gives back.
        self._is_closing = True
        self._wake.set()
        await asyncio.wait((self._pump,), timeout=_CLOSE_S)
        self._pump.cancel()
        for account in self._accounts.values():
            self._note(account.lapse(even_if_valid=True))
            if account.held:
                self._note(account.give(account.held, 0))
        if self._changes or self._spending:
            await self._exchange(())

    async def admit(self, principal: Principal, *, end_user: str | None = None, estimate: Estimate) -> Reservation:
        """Admit one run of a caller that has an allowance, and reserve what its estimate says.

        Raises `RateLimited`, `BudgetExhausted`, or `ServiceUnavailable` for a budget nobody can look at.
        """
        plan = self._plan_of(principal, end_user)
        parts = await self.take(wants_of(plan.accounts, estimate) if plan.of_calls else plan.wants, principal.key_id)
        held = [part for part in parts if part.account in plan.of_runs] if plan.of_runs else []
        used = [part for part in parts if part.account in plan.of_calls] if plan.of_calls else []
        return Reservation(self, principal.key_id, plan.of_calls, held, used, _standing(plan.told))

    def weighs(self, principal: Principal, end_user: str | None) -> bool:
        """Return whether it matters to a caller's limits how many tokens, or how much money, a call may use."""
        return bool(self._plan_of(principal, end_user).of_calls)

    async def take(self, wants: Sequence[Want], key_id: str) -> list[Part]:
        """Take all of it, or nothing; raises as `admit` does."""
        parts: list[Part] = []
        missing: list[Want] = []
        for account, amount in wants:
            slot = account.draw(amount)
            if slot is None:
                missing.append((account, amount))
            elif amount:
                parts.append(Part(account, amount, slot))
        if not missing:
            return parts
        try:
            answer = await self._ask(missing)
            if isinstance(answer, Refusal) and self._hand_in(missing):
                answer = await self._ask(missing)
        except LimitStoreDown:
            if not any(account.counted.measure == "cost" for account, _ in missing):
                self._metrics.limit_unchecked(self._store.name)
                return parts
            self.give_back(parts)
            self._metrics.limit_rejected("cost", "store")
            raise ServiceUnavailable(
                "The budget of this key cannot be looked at now, so nothing is spent of it; send the request again in "
                "a moment.",
                code="limits_unavailable",
                retry_after_s=_DOWN_S,
            ) from None
        except BaseException:
            self.give_back(parts)
            raise
        if isinstance(answer, Refusal):
            self.give_back(parts)
            account, amount = missing[answer.index]
            account.used = answer.used
            self._refuse(account, amount, answer.wait_ms, key_id)
        for (account, amount), grant in zip(missing, answer, strict=True):
            if amount:
                parts.append(Part(account, amount, grant.slot))
        return parts

    def give_back(self, parts: Sequence[Part]) -> None:
        """Give back what was taken and not used."""
        for part in parts:
            self._note(part.account.give(part.amount, part.slot))

    def settle(self, part: Part, used: int) -> None:
        """Replace what was reserved by what was used, be it more or less."""
        if used < part.amount:
            self._note(part.account.give(part.amount - used, part.slot))
        elif used > part.amount:
            self._note(part.account.charge(used - part.amount))

    def charge(self, account: Account, used: int) -> None:
        """Count what was used without a reservation."""
        if used:
            self._note(account.charge(used))

    def spent(self, account: Account, nanodollars: int) -> None:
        """Take note of what was really spent of a budget, for whoever wants to be told of it."""
        if self._on_spent is None or not nanodollars:
            return
        of = account.counted
        self._spending[of.rule.key] = (of, self._spending.get(of.rule.key, (of, 0))[1] + nanodollars)
        self._wake.set()

    def leases(self) -> int:
        """Return how many blocks this process has leased and not used up."""
        return sum(1 for account in self._accounts.values() if account.leased)

    def _plan_of(self, principal: Principal, end_user: str | None) -> _Plan:
        allowance = principal.allowance
        assert allowance is not None, "asked for callers with an allowance only"
        plan = self._plans.get(principal.key_id)
        if plan is None or plan.allowance is not allowance:
            rules = (
                *counted("key", principal.key_id, allowance.key),
                *counted("namespace", principal.namespace, allowance.namespace),
            )
            plan = _planned(allowance, self._open(rules))
            _remember(self._plans, principal.key_id, plan)
        if end_user is None or allowance.end_user is None:
            return plan
        name = (principal.key_id, end_user)
        users = self._user_plans.get(name)
        if users is None or users.allowance is not allowance:
            rules = counted("end_user", end_user_name(principal.key_id, end_user), allowance.end_user)
            users = _planned(allowance, _money_last(plan.accounts + self._open(rules)))
            _remember(self._user_plans, name, users)
        return users

    def _open(self, rules: Sequence[Counted]) -> tuple[Account, ...]:
        if len(self._accounts) >= 4 * _MOST_PLANS:
            self._accounts = {key: account for key, account in self._accounts.items() if not account.is_idle}
        accounts = []
        for found in rules:
            account = self._accounts.get(found.rule.key)
            if account is None:
                account = self._accounts[found.rule.key] = Account(found)
            account.counted = found  # a limit may have changed; what is held and leased goes on
            accounts.append(account)
        return _money_last(accounts)

    async def _ask(self, missing: Sequence[Want]) -> tuple[Grant, ...] | Refusal:
        if self._memory is not None:
            sent_at = time.monotonic()
            answer = self._memory.take(tuple([account.ask(amount) for account, amount in missing]), self._holder)
            self._granted(missing, answer, sent_at)
            return answer
        if time.monotonic() < self._down_until:
            raise LimitStoreDown("the store was down a moment ago")
        waiting = _Waiting(missing, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        try:
            return await waiting.future
        except asyncio.CancelledError:
            if waiting.future.done() and not waiting.future.cancelled() and not waiting.future.exception():
                self._return(missing, waiting.future.result())
            raise

    def _hand_in(self, wants: Sequence[Want]) -> bool:
        """Give back what is leased of the accounts: together with what the store has it may be enough."""
        rests = [rest for account, _ in wants if (rest := account.lapse(even_if_valid=True)) is not None]
        for rest in rests:
            self._note(rest)
        return bool(rests)

    def _granted(self, wants: Sequence[Want], answer: tuple[Grant, ...] | Refusal, sent_at: float) -> None:
        if isinstance(answer, Refusal):
            return
        for (account, amount), grant in zip(wants, answer, strict=True):
            self._note(account.granted(grant, amount, sent_at))

    def _return(self, wants: Sequence[Want], answer: tuple[Grant, ...] | Refusal) -> None:
        if not isinstance(answer, Refusal):
            granted = zip(wants, answer, strict=True)
            self.give_back([Part(account, amount, grant.slot) for (account, amount), grant in granted if amount])

    def _note(self, change: Change | None) -> None:
        if change is None:
            return
        if self._memory is not None:
            self._memory.change(change, self._holder)
            return
        if len(self._changes) < _MOST_CHANGES:
            self._changes.append(change)
        self._wake.set()

    def _refuse(self, account: Account, amount: int, wait_ms: int, key_id: str) -> NoReturn:
        of = account.counted
        self._metrics.limit_rejected(of.measure, of.scope)
        log_event(
            _log,
            "limit.rejected",
            level=logging.INFO,
            key_id=key_id,
            scope=of.scope,
            limit=of.measure,
            retry_after_ms=max(wait_ms, 0),
        )
        raise _refusal(account, amount, wait_ms, key_id)

    async def _work(self) -> None:
        while not self._is_closing:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                for account in list(self._accounts.values()):
                    self._note(account.lapse())
                self._metrics.limit_leases(self.leases())
            self._wake.clear()
            if not (self._waiting or self._changes or self._spending or time.monotonic() >= self._renew_at):
                continue
            if time.monotonic() < self._down_until:
                await asyncio.sleep(max(self._down_until - time.monotonic(), 0))
            waiting, self._waiting = self._waiting[:_MOST_GROUPS], self._waiting[_MOST_GROUPS:]
            if self._waiting:
                self._wake.set()
            await self._exchange(waiting)

    async def _exchange(self, waiting: Sequence[_Waiting]) -> None:
        """Send one batch; hand out the answers, or keep what must not be lost for the next."""
        # Until the store answers again, changes wait: sent twice, they would count twice.
        waits = [change for change in self._changes if change.rule.window_ms] if self._is_down else []
        changes, self._changes = [] if self._is_down else self._changes, waits
        spending, self._spending = self._spending, {}
        renewals: tuple[Renewal, ...] = ()
        if time.monotonic() >= self._renew_at:
            renewals = tuple(r for account in self._accounts.values() if (r := account.renewal()) is not None)
            self._renew_at = time.monotonic() + _RENEW_S
        asked: set[Account] = set()
        groups = []
        for one in waiting:
            groups.append(tuple([account.ask(amount, is_asked=account in asked) for account, amount in one.wants]))
            asked.update(account for account, _ in one.wants)
        notes = [Change(_spent_rule(of.rule), amount) for of, amount in spending.values()]
        batch = Batch(self._holder, tuple(groups), (*changes, *notes), renewals)
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(_ANSWER_S if self._has_answered else _FIRST_ANSWER_S):
                answer = await self._store.exchange(batch) if batch.rules() else _NO_ANSWER
        except Exception as error:  # noqa: BLE001 - a border: whatever a library raises, waiting callers get an answer
            self._went_down(error)
            # Perhaps it was all done: what was given back may count as used, never the other way round.
            self._changes = [change for change in changes if change.amount > 0] + self._changes
            self._renew_at = 0.0
            for key, (of, amount) in spending.items():
                self._spending[key] = (of, amount + self._spending.get(key, (of, 0))[1])
            for one in waiting:
                if not one.future.done():
                    one.future.set_exception(LimitStoreDown(str(error)))
            return
        if answer is not _NO_ANSWER:  # nobody was asked, so nothing is known
            self._has_answered = True
            self._came_back()
        for one, found in zip(waiting, answer.groups, strict=True):
            self._granted(one.wants, found, sent_at)
            if one.future.done():
                self._return(one.wants, found)
            else:
                one.future.set_result(found)
        if self._on_spent is not None:
            for (of, _), total in zip(spending.values(), answer.totals[len(changes) :], strict=True):
                self._on_spent(of, total)

    def _went_down(self, error: BaseException) -> None:
        self._down_until = time.monotonic() + _DOWN_S
        self._metrics.limit_store_failed(self._store.name)
        if not self._is_down:
            self._is_down = True
            log_event(
                _log,
                "limit.store.unreachable",
                level=logging.ERROR,
                message="Speed limits are open and cost limits closed until the store of the limits answers again.",
                store=self._store.name,
                reason=_reason(error),
                exc_info=error,
            )

    def _came_back(self) -> None:
        if self._is_down:
            self._is_down = False
            log_event(_log, "limit.store.reachable", store=self._store.name)


def _reason(error: BaseException) -> str:
    """Say why the store cannot be had, in the words of its client: they name its address, and no password."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__


def _remember(plans: dict[K, _Plan], name: K, plan: _Plan) -> None:
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[name] = plan


def _money_last(accounts: Sequence[Account]) -> tuple[Account, ...]:
    """Speed limits refuse first, budgets after them."""
    return tuple(sorted(accounts, key=lambda account: account.counted.measure == "cost"))


def _refusal(account: Account, amount: int, wait_ms: int, key_id: str) -> GatewayError:
    of, limit = account.counted, account.counted.rule.limit
    whose = _WHOSE[of.scope].format(key_id)
    if of.measure == "cost":
        text = f"The budget of {whose} is used up: {limit / NANO:g} USD in 24 hours, of which "
        text += f"{max(limit - account.used, 0) / NANO:.6f} are left"
        if amount > 1:
            text += f", and this call may cost up to {amount / NANO:.6f}. Send a smaller max_completion_tokens"
        return BudgetExhausted(f"{text}. Ask the gateway's operator for more, or wait.")
    retry_after_s = wait_ms / 1000 if wait_ms >= 0 else None
    again = f"Please try again in {duration(wait_ms).decode()}." if wait_ms >= 0 else "It never fits; ask for less."
    text = {
        "requests": f"Rate limit reached for requests: {whose} may send {limit} a minute. {again}",
        "tokens": f"Rate limit reached for tokens: {whose} may use {limit} a minute, and this call needs up to "
        f"{amount}. {again}",
        "runs": f"Too many runs at one time: {whose} may have {limit} under way. {again}",
    }[of.measure]
    error = RateLimited(text, retry_after_s=retry_after_s)
    error.type = "rate_limit_error" if of.measure == "runs" else of.measure
    if wait_ms < 0:
        error.should_retry = False
    if of.measure != "runs":
        error.headers = Standing(of.measure, limit, account.remaining, max(wait_ms, 0)).headers()
    return error


def _spent_rule(rule: Rule) -> Rule:
    return Rule(f"spent/{rule.key}", rule.limit, rule.window_ms, rule.slot_ms)


def _planned(allowance: Allowance, accounts: tuple[Account, ...]) -> _Plan:
    def of(*measures: Measure) -> tuple[Account, ...]:
        return tuple(account for account in accounts if account.counted.measure in measures)

    of_runs, told = of("runs"), of("requests", "tokens")
    return _Plan(allowance, accounts, of(*OF_CALLS), of_runs, told, wants_of(accounts, NOTHING))


def _standing(told: Sequence[Account]) -> tuple[Standing, ...]:
    """Return the tightest limit of each measure."""
    if len(told) == 1:
        return (told[0].standing(),)
    found: dict[Measure, Standing] = {}
    for account in told:
        standing = account.standing()
        known = found.get(standing.measure)
        if known is None or standing.remaining < known.remaining:
            found[standing.measure] = standing
    return tuple(found.values())
