"""The budget of one run: every cap stops it and is named, and stays refused."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import RunBudgetExceeded
from gateway.events import Usage
from gateway.limits.reservation import Estimate
from gateway.limits.run_budget import RunBudget, RunCaps


@pytest.mark.parametrize(
    ("caps", "named"),
    [
        (RunCaps(depth=2), "GATEWAY_RUN_MAX_DEPTH"),
        (RunCaps(model_calls=2), "GATEWAY_RUN_MAX_MODEL_CALLS"),
        (RunCaps(tool_calls=2), "GATEWAY_RUN_MAX_TOOL_CALLS"),
        (RunCaps(tokens=100), "GATEWAY_RUN_MAX_TOKENS"),
        (RunCaps(nanodollars=100), "GATEWAY_RUN_MAX_COST_USD"),
    ],
)
def test_each_cap_stops_the_run_and_is_named(caps: RunCaps, named: str) -> None:
    async def main() -> None:
        budget = RunBudget(caps)
        for depth in (1, 2):
            budget.check_depth(depth)
            budget.count_model_call()
            budget.count_tool_call()
            (await budget.begin_call(Estimate(50, 50))).settle(Usage(input_tokens=50, cost=50_000))

        async def one_more() -> None:
            budget.check_depth(3)
            budget.count_tool_call()
            budget.count_model_call()
            await budget.begin_call(Estimate(1, 1))

        with pytest.raises(RunBudgetExceeded, match=named) as caught:
            await one_more()
        assert (caught.value.code, caught.value.should_retry) == ("run_budget_exceeded", False)
        for again in (budget.count_model_call, budget.count_tool_call):
            with pytest.raises(RunBudgetExceeded, match=named):
                again()
        with pytest.raises(RunBudgetExceeded, match=named):
            await budget.begin_call(Estimate(0, 0))

    asyncio.run(main())


def test_open_calls_count_with_their_worst_case_until_they_are_settled() -> None:
    async def main() -> None:
        budget = RunBudget(RunCaps(tokens=100))
        one = await budget.begin_call(Estimate(60))
        one.settle(Usage(input_tokens=10))
        one.release()
        two = await budget.begin_call(Estimate(90))
        two.release()
        await budget.begin_call(Estimate(90))
        with pytest.raises(RunBudgetExceeded):
            await budget.begin_call(Estimate(1))

    asyncio.run(main())


def test_a_default_worst_case_does_not_stop_a_run_that_has_something_left() -> None:
    async def main() -> None:
        budget = RunBudget(RunCaps(tokens=100, nanodollars=100))
        (await budget.begin_call(Estimate(5_000, 5_000, is_promised=False))).settle(Usage(input_tokens=99))
        (await budget.begin_call(Estimate(5_000, 5_000, is_promised=False))).settle(Usage(input_tokens=30))
        with pytest.raises(RunBudgetExceeded):
            await budget.begin_call(Estimate(5_000, 5_000, is_promised=False))

    asyncio.run(main())
