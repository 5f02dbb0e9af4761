"""Budget alerts: a signed webhook when set shares of a budget are spent, once for each share and window.

One process of all holds an alert while it sends it, and counts it as told when it has: where a process is killed in
between, the next one that sees the share spent tells of it, under the same id.

The body is signed as the Standard Webhooks specification says: ``webhook-id``, ``webhook-timestamp`` (epoch seconds)
and ``webhook-signature``, which is ``v1,`` and the base64 of HMAC-SHA256 over ``id.timestamp.body`` with the secret.
Where the alerts go, the operator's environment says alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import ssl
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from urllib.parse import urlsplit

import msgspec

from gateway.config import Settings, is_web_address
from gateway.errors import ConfigError
from gateway.limits.port import Ask, Batch, Change, LimitStore, LimitStoreDown, Refusal, Rule
from gateway.limits.rules import NANO, Counted
from gateway.observability.logs import log_event
from gateway.observability.metrics import Metrics

_log = logging.getLogger("gateway.limits")

_ANSWER_S = 10.0
_BACKOFF_S = (1.0, 5.0, 30.0, 120.0, 600.0)
_MOST_WAITING = 1_000
_AT_ONCE = 4
"""Deliveries under way: the threads they wait in are those of plain tools, too."""

_CLOSE_S = 2.0
_MARGIN_S = 60.0

Post = Callable[[str, bytes, dict[str, str]], int]
"""Sends a body to an address and returns the status; raises `OSError`."""


class AlertConfig(msgspec.Struct, frozen=True):
    """Where alerts go, what they are signed with, and at which shares of a budget (0 to 1) they are due."""

    url: str
    secret: str
    shares: tuple[float, ...]


class BudgetAlerts:
    """Sends alerts in the background; use inside ``async with``."""

    def __init__(
        self,
        config: AlertConfig,
        store: LimitStore,
        metrics: Metrics,
        *,
        post: Post | None = None,
        backoff_s: tuple[float, ...] = _BACKOFF_S,
    ) -> None:
        self._config = config
        self._store = store
        self._metrics = metrics
        self._post = post or post_json
        self._backoff_s = backoff_s
        self._reached: dict[tuple[str, float], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lanes = asyncio.Semaphore(_AT_ONCE)
        tries_s = sum(backoff_s) + (len(backoff_s) + 1) * _ANSWER_S
        self._hold_ms = int((tries_s + _MARGIN_S) * 1000)
        self._holder = uuid.uuid4().hex

    async def __aenter__(self) -> BudgetAlerts:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spent(self, of: Counted, nanodollars: int) -> None:
        """Take note of what was spent of a budget in its window; tell of every share that is now reached."""
        now = time.monotonic()
        for share in self._config.shares:
            if nanodollars < share * of.rule.limit:
                continue
            key = (of.rule.key, share)
            if self._reached.get(key, 0.0) > now or len(self._tasks) >= _MOST_WAITING:
                continue
            self._reached[key] = now + of.rule.window_ms / 1000
            task = asyncio.create_task(self._tell(of, share, nanodollars, key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tell(self, of: Counted, share: float, nanodollars: int, key: tuple[str, float]) -> None:
        told = Rule(f"alert/{of.rule.key}/{share:g}", 1, of.rule.window_ms)
        held = Rule(f"alert/{of.rule.key}/{share:g}/held", 1, 0, hold_ms=self._hold_ms)
        try:
            answer = await self._store.exchange(Batch(self._holder, ((Ask(told, 0), Ask(held, 1)),)))
        except LimitStoreDown:
            self._reached.pop(key, None)  # the next call that is settled tries again
            return
        found = answer.groups[0]
        if isinstance(found, Refusal):
            if found.index:  # another process is at it
                self._reached[key] = time.monotonic() + self._hold_ms / 1000
            return
        scope, name = of.rule.key.split("/", 1)
        body = msgspec.json.encode(
            {
                "type": "budget.threshold_reached",
                "timestamp": int(time.time()),
                "data": {
                    "scope": scope,
                    "id": name.removesuffix("/cost"),
                    "share": share,
                    "limit_usd": of.rule.limit / NANO,
                    "spent_usd": nanodollars / NANO,
                    "window_s": of.rule.window_ms // 1000,
                },
            }
        )
        reason: str | None = "the gateway ended"
        try:
            reason = await self._try(_id_of(of, share), body)
            with suppress(LimitStoreDown):  # then it is told again, under the same id
                await self._store.exchange(Batch(self._holder, changes=(Change(told, 1), Change(held, -1))))
        finally:  # also where the gateway ends before it has arrived: it is told of once the hold has passed
            if reason is None:
                self._metrics.budget_alert("delivered")
                log_event(_log, "budget.alert.sent", budget=of.rule.key, share=share)
            else:
                self._metrics.budget_alert("failed")
                log_event(
                    _log, "budget.alert.failed", level=logging.ERROR, budget=of.rule.key, share=share, reason=reason
                )

    async def _try(self, delivery: str, body: bytes) -> str | None:
        """Send until it arrives; return why it did not after the last try, or None."""
        for wait_s in self._backoff_s:
            if await self._deliver(delivery, body) is None:
                return None
            self._metrics.budget_alert("retried")
            await asyncio.sleep(wait_s)
        return await self._deliver(delivery, body)

    async def _deliver(self, delivery: str, body: bytes) -> str | None:
        """Send once; return why it did not arrive, or None."""
        async with self._lanes:
            moment = int(time.time())
            headers = {
                "content-type": "application/json",
                "user-agent": "agent-gateway",
                "webhook-id": delivery,
                "webhook-timestamp": str(moment),
                "webhook-signature": signature(self._config.secret, delivery, moment, body),
            }
            try:
                status = await asyncio.to_thread(self._post, self._config.url, body, headers)
            except OSError as error:
                return type(error.__cause__ or error).__name__
        return None if 200 <= status < 300 else f"status {status}"


def _id_of(of: Counted, share: float) -> str:
    """Return the id of an alert: the same in every process, and another one a window later."""
    window = int(time.time() * 1000) // of.rule.window_ms
    return f"msg_{hashlib.sha256(f'{of.rule.key}/{share:g}/{window}'.encode()).hexdigest()[:32]}"


def signature(secret: str, delivery: str, timestamp: int, body: bytes) -> str:
    """Return what ``webhook-signature`` must be. A secret that begins with ``whsec_`` is base64 after it."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    signed = hmac.new(key, f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def alert_config(settings: Settings) -> AlertConfig | None:
    """Return what the settings say of alerts, None where there are none. Raises `ConfigError`."""
    url, secret = settings.budget_alert_url, settings.budget_alert_secret
    if url is None:
        return None
    if not is_web_address(url):
        raise ConfigError("GATEWAY_BUDGET_ALERT_URL is not an address; write https://HOST/PATH.")
    if urlsplit(url).username is not None:
        raise ConfigError(
            "GATEWAY_BUDGET_ALERT_URL has a user before its host, which is not sent; leave it out: the receiver knows "
            "the gateway by the signature."
        )
    if secret is None:
        raise ConfigError("GATEWAY_BUDGET_ALERT_URL needs GATEWAY_BUDGET_ALERT_SECRET, which alerts are signed with.")
    try:
        signature(secret, "", 0, b"")
        shares = tuple(sorted(float(share) for share in settings.budget_alert_shares))
    except ValueError as error:
        raise ConfigError(
            "GATEWAY_BUDGET_ALERT_SHARES needs numbers such as 0.5,0.8,1.0, and a GATEWAY_BUDGET_ALERT_SECRET that "
            "begins with whsec_ needs base64 after it."
        ) from error
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError("GATEWAY_BUDGET_ALERT_SHARES needs shares above 0 and up to 1, such as 0.5,0.8,1.0.")
    return AlertConfig(url, secret, shares)


def post_json(url: str, body: bytes, headers: dict[str, str]) -> int:
    """Send a body and return the status, following no redirect; raises `OSError`, also for an answer that is none."""
    import http.client  # noqa: PLC0415 - a twentieth of the time of a start, for those who have alerts

    parts = urlsplit(url)
    assert parts.hostname is not None, "`alert_config` saw to it"
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_ANSWER_S, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_ANSWER_S)
    try:
        target = parts.path or "/"
        connection.request("POST", f"{target}?{parts.query}" if parts.query else target, body, headers)
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise ConnectionError("The answer is not HTTP.") from error
    finally:
        connection.close()
