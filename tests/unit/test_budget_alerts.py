"""Budget alerts: what is refused at the start, and a receiver that hangs holds up nobody."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.limits.alerts import AlertConfig, BudgetAlerts, alert_config
from gateway.limits.memory import MemoryLimits
from gateway.limits.rules import NANO, counted
from gateway.observability.metrics import Metrics
from gateway.principal import Limits
from tests.support.waiting import wait_for


@pytest.mark.parametrize(
    "url",
    [
        "ftp://hooks.example/x",
        "http://",
        "http://[::1",
        "http://hooks.example:99999/x",
        "http://hooks.example:port/x",
        "https://hooks.example/ä",
        "https://hooks.example/a b",
        "https://me:word@hooks.example/x",
    ],
)
def test_an_address_that_nothing_can_be_sent_to_stops_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match="GATEWAY_BUDGET_ALERT_URL"):
        alert_config(Settings(budget_alert_url=url, budget_alert_secret="shh"))


def test_an_alert_that_did_not_arrive_before_the_end_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tried = threading.Event()

    def post(url: str, body: bytes, headers: dict[str, str]) -> int:
        tried.set()
        raise ConnectionRefusedError

    async def main() -> None:
        config = AlertConfig("https://hooks.example/x", "shh", (0.5,))
        async with BudgetAlerts(config, MemoryLimits(), Metrics(), post=post, backoff_s=(600.0,)) as alerts:
            (budget,) = counted("key", "alice", Limits(cost_per_day_usd=1))
            alerts.spent(budget, NANO)
            assert await asyncio.to_thread(tried.wait, 60)

    asyncio.run(main())
    (failed,) = [
        record.__dict__["fields"] for record in caplog.records if record.__dict__.get("event") == "budget.alert.failed"
    ]
    assert (failed["budget"], failed["reason"]) == ("key/alice/cost", "the gateway ended")


def test_what_a_killed_process_was_telling_is_told_by_another() -> None:
    """Nothing is said at its end: it stops in the middle of a delivery, with the alert in its hands."""
    now, let_go, tried, ids = [0], threading.Event(), threading.Event(), list[str]()
    store = MemoryLimits(lambda: now[0])
    config = AlertConfig("https://hooks.example/x", "shh", (0.5,))
    (budget,) = counted("key", "alice", Limits(cost_per_day_usd=1))

    def hang(url: str, body: bytes, headers: dict[str, str]) -> int:
        ids.append(headers["webhook-id"])
        tried.set()
        let_go.wait(60)
        raise ConnectionRefusedError

    def post(url: str, body: bytes, headers: dict[str, str]) -> int:
        ids.append(headers["webhook-id"])
        return 204

    async def see() -> None:
        async with BudgetAlerts(config, store, Metrics(), post=post) as alerts:
            alerts.spent(budget, NANO)
            alerts.spent(budget, NANO)

    async def main() -> None:
        async with BudgetAlerts(config, store, Metrics(), post=hang, backoff_s=(600.0,)) as killed:
            killed.spent(budget, NANO)
            assert await asyncio.to_thread(tried.wait, 60)
            let_go.set()
        await see()
        assert len(ids) == 1, "it may still be at it"
        now[0] += 3_600_000
        await see()
        assert len(ids) == 2
        await see()
        now[0] += 3_600_000
        await see()
        assert len(ids) == 2, "told is told"
        now[0] += 86_400_000
        await see()

    asyncio.run(main())
    assert len(ids) == 3
    assert ids[0] == ids[1]


def test_a_receiver_that_hangs_holds_few_of_the_threads_that_tools_run_in() -> None:
    let_go, guard, now, most = threading.Event(), threading.Lock(), 0, 0

    def post(url: str, body: bytes, headers: dict[str, str]) -> int:
        nonlocal now, most
        with guard:
            now += 1
            most = max(most, now)
        let_go.wait(60)
        with guard:
            now -= 1
        return 204

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
        config = AlertConfig("https://hooks.example/x", "shh", (0.5,))
        async with BudgetAlerts(config, MemoryLimits(), Metrics(), post=post) as alerts:
            for number in range(40):
                (budget,) = counted("key", f"key-{number}", Limits(cost_per_day_usd=1))
                alerts.spent(budget, NANO)
            await asyncio.to_thread(wait_for, lambda: now >= 4, what="four are under way")
            let_go.set()

    asyncio.run(main())
    assert most == 4
