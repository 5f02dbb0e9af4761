"""Routing: who is asked, in which order, how often, and who is left alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Settings
from gateway.errors import (
    ConfigError,
    GatewayError,
    InvalidRequest,
    UnsupportedValue,
    UpstreamAuthFailed,
    UpstreamError,
    UpstreamIncomplete,
    UpstreamMalformed,
    UpstreamModelNotFound,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from gateway.observability.metrics import Metrics
from gateway.routing.bodies import with_max_tokens_as, with_model
from gateway.routing.budget import RetryBudget
from gateway.routing.config import RoutingConfig, load_routing
from gateway.routing.failures import kind_of
from gateway.routing.routed import RoutedBinding
from gateway.routing.table import Router, RouteTable
from tests.support.fake_servers import FakeServer, table

BODY = b'{"model":"m","messages":[]}'


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def routes(
    *servers: FakeServer, clock: Clock | None = None, metrics: Metrics | None = None, **rules: Any
) -> RouteTable:
    config = msgspec.convert(rules, RoutingConfig)
    router = Router(metrics or Metrics(), clock=clock or Clock(), chance=random.Random(1))
    return router.build(table(*servers), config)


def bound(binding: RoutedBinding | None) -> RoutedBinding:
    assert binding is not None
    return binding


def ask(binding: RoutedBinding | None, body: bytes = BODY) -> str:
    return asyncio.run(bound(binding).upstream.post("/chat/completions", body)).decode()


def virtual(*ids: str, **rules: Any) -> dict[str, Any]:
    return {"models": {"v": {"targets": [{"model": id_} for id_ in ids], **rules}}}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UpstreamUnreachable("x"), "connect"),
        (UpstreamTimeout("x"), "timeout"),
        (UpstreamRateLimited("x"), "rate_limit"),
        (UpstreamError("x"), "server_error"),
        (UpstreamUnavailable("x"), "server_error"),
        (UpstreamError("x", should_retry=False), "refused"),
        (UpstreamMalformed("x"), "malformed"),
        (UpstreamIncomplete("x"), "incomplete"),
        (UpstreamAuthFailed("x"), "refused"),
        (UpstreamModelNotFound("x"), "refused"),
        (UpstreamRejected("x", code="context_length_exceeded"), "context_length"),
        (UpstreamRejected("x", code="content_filter"), "content_policy"),
        (UpstreamRejected("x"), None),
        (InvalidRequest("x"), None),
    ],
)
def test_kind_of_failure(error: GatewayError, kind: str | None) -> None:
    assert kind_of(error) == kind


def test_the_model_is_replaced_and_every_other_byte_stays() -> None:
    body = '{"messages" : [ {"content":"ä\\u00e4 {\\"model\\": 1}"} ],"model":"m","n": 1.50}'.encode()
    changed = with_model(body, 'new"name')
    assert json.loads(changed) == json.loads(body) | {"model": 'new"name'}
    assert '[ {"content":"ä\\u00e4 {\\"model\\": 1}"} ]'.encode() in changed and b"1.50" in changed


def test_a_plain_name_goes_down_the_order_of_priority() -> None:
    first, second = FakeServer("a", [UpstreamError("down")]), FakeServer("b")
    other = FakeServer("c", models=("else",))
    binding = routes(first, second, other).resolve("m")
    assert ask(binding) == "b"
    assert binding.upstream.decision is not None
    assert (binding.upstream.decision.upstream, binding.upstream.decision.attempts) == ("b", 2)
    assert len(other.bodies) == 0


def test_an_upstream_that_speaks_another_api_does_not_step_in_for_an_agent() -> None:
    with pytest.raises(UpstreamError):
        ask(routes(FakeServer("a", [UpstreamError("down")]), FakeServer("b", api="responses")).resolve("m"))


@pytest.mark.parametrize("name", ["a/m", None])
def test_a_name_with_its_upstream_or_an_agents_own_upstream_is_not_moved(name: str | None) -> None:
    down, well = FakeServer("a", [UpstreamError("down")]), FakeServer("b")
    with pytest.raises(UpstreamError, match="down"):
        ask(routes(down, well).resolve(name, upstream=None if name else "a"))
    assert not well.bodies


def test_no_connection_is_tried_once_more_and_the_rest_is_not() -> None:
    flaky = FakeServer("a", [UpstreamUnreachable("refused"), True])
    assert ask(routes(flaky, retry={"connect": {"attempts": 2, "backoff_s": 0}}).find_model("a/m")) == "a"
    failing = FakeServer("a", [UpstreamError("500"), True])
    with pytest.raises(UpstreamError, match="500") as caught:
        ask(routes(failing).find_model("a/m"))
    assert len(failing.bodies) == 1 and caught.value.routed == ("a", 1)


def test_a_retry_rule_counts_tries_per_target() -> None:
    dead = FakeServer("a", [UpstreamTimeout("slow")])
    rules = {"retry": {"timeout": {"attempts": 3, "backoff_s": 0}}}
    gate = routes(dead, **rules)
    for _ in range(15):
        with pytest.raises(UpstreamTimeout):
            ask(gate.find_model("a/m"))
    assert len(dead.bodies) <= 15 * 1.2 + 1


def test_a_refused_request_is_not_tried_elsewhere() -> None:
    first, second = FakeServer("a", [UpstreamRejected("bad field", status=400)]), FakeServer("b")
    with pytest.raises(UpstreamRejected):
        ask(routes(first, second, **virtual("a/m", "b/m")).find_model("v"))
    assert not second.bodies


def test_each_fallback_list_answers_its_own_failure_only() -> None:
    lists = {
        "fallbacks": ["any/m"],
        "context_length_fallbacks": ["long/m"],
        "content_policy_fallbacks": ["lax/m"],
    }
    others = [FakeServer("any"), FakeServer("long"), FakeServer("lax")]
    failures = {
        "any": UpstreamError("down"),
        "long": UpstreamRejected("too long", status=400, code="context_length_exceeded"),
        "lax": UpstreamRejected("no", status=400, code="content_filter"),
    }
    for name, error in failures.items():
        gate = routes(FakeServer("a", [error]), *others, models={"a/m": lists})
        assert ask(gate.find_model("a/m")) == name
        assert ask(gate.resolve("a/m")) == name


def test_fallbacks_may_be_virtual_and_are_asked_once_each() -> None:
    servers = [FakeServer(name, [UpstreamError(name)]) for name in ("a", "b", "c")]
    models = {"a/m": {"fallbacks": ["v", "a/m"]}, "v": {"targets": [{"model": "b/m"}, {"model": "c/m"}]}}
    with pytest.raises(UpstreamError, match=r"^c$"):
        ask(routes(*servers, models=models).find_model("a/m"))
    assert [len(server.bodies) for server in servers] == [1, 1, 1]


def test_the_body_carries_the_name_the_target_knows() -> None:
    first, second = FakeServer("a", [UpstreamError("down")], models=("x",)), FakeServer("b", models=("y",))
    binding = bound(routes(first, second, **virtual("a/x", "b/y")).find_model("v"))
    ask(binding, b'{"model":"x"}')
    assert binding.model == "x"
    assert (first.bodies, second.bodies) == ([b'{"model":"x"}'], [b'{"model":"y"}'])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"max_tokens":5,"n":1.50}', b'{"n":1.50,"max_completion_tokens":5}'),
        (b'{"max_tokens":5,"max_completion_tokens":6}', b'{"max_completion_tokens":6}'),
        (b'{"max_completion_tokens":6}', b'{"max_completion_tokens":6}'),
        (b'{"x":"max_tokens"}', b'{"x":"max_tokens"}'),
    ],
)
def test_the_limit_of_tokens_stands_under_one_name(body: bytes, expected: bytes) -> None:
    assert with_max_tokens_as(body, "max_completion_tokens") == expected


def test_weights_share_the_calls() -> None:
    a, b = FakeServer("a"), FakeServer("b")
    gate = routes(
        a, b, models={"v": {"strategy": "weighted", "targets": [{"model": "a/m", "weight": 3}, {"model": "b/m"}]}}
    )
    shares = Counter(ask(gate.find_model("v")) for _ in range(400))
    assert 260 < shares["a"] < 340


def test_least_busy_and_lowest_latency_choose() -> None:
    a, b = FakeServer("a"), FakeServer("b")
    gate = routes(a, b, **virtual("a/m", "b/m", strategy="least_busy"))
    first = bound(gate.find_model("v")).upstream.route.candidates[0].health
    first.begin()
    assert ask(gate.find_model("v")) == "b"
    quick = routes(a, b, **virtual("a/m", "b/m", strategy="lowest_latency"))
    slow, fast = bound(quick.find_model("v")).upstream.route.candidates
    slow.health.answered(2.0)
    fast.health.answered(0.1)
    assert Counter(ask(quick.find_model("v")) for _ in range(100))["b"] > 85


def breaker_state(metrics: Metrics) -> float:
    """What the gauge of model ``m`` at upstream ``a`` shows."""
    (family,) = [family for family in metrics.families if family.name == "agent_gateway_routing_breaker_state"]
    return dict(family.totals())["a", "m"][0]


def test_the_breaker_opens_lets_one_probe_through_and_closes() -> None:
    clock, metrics = Clock(), Metrics()
    a, b = FakeServer("a", [UpstreamError("down")]), FakeServer("b")
    gate = routes(a, b, clock=clock, metrics=metrics, **virtual("a/m", "b/m"))
    for _ in range(8):
        assert ask(gate.find_model("v")) == "b"
    assert len(a.bodies) == 5
    health = bound(gate.find_model("v")).upstream.route.candidates[0].health
    assert health.state == "open"
    assert breaker_state(metrics) == 2
    clock.now += 10
    assert health.waits_s() == 0
    assert health.begin() and health.state == "half_open"
    assert health.waits_s() > 0, "a second call beside the probe"
    health.failed("server_error", None)
    assert health.state == "open" and health.waits_s() == 10
    clock.now += 10
    a.script = [True]
    assert ask(gate.find_model("v")) == "a"
    assert health.state == "closed"
    assert breaker_state(metrics) == 0


def test_a_probe_that_the_caller_gives_up_leaves_the_breaker_open() -> None:
    clock = Clock()
    gate = routes(FakeServer("a"), clock=clock)
    health = bound(gate.find_model("a/m")).upstream.route.candidates[0].health
    for _ in range(5):
        health.begin()
        health.failed("timeout", None)
    clock.now += 10
    probe = health.begin()
    health.abandoned(probe)
    assert health.state == "open" and health.waits_s() == 0 and health.in_flight == 0


def test_an_only_target_is_tried_though_its_breaker_is_open_unless_told_otherwise() -> None:
    dead = FakeServer("a", [UpstreamError("down")])
    gate = routes(dead)
    for _ in range(9):
        with pytest.raises(UpstreamError, match="down"):
            ask(gate.find_model("a/m"))
    assert len(dead.bodies) == 9
    strict = FakeServer("a", [UpstreamError("down")])
    gate = routes(strict, breaker={"refuse_when_alone": True})
    for _ in range(5):
        with pytest.raises(UpstreamError, match="down"):
            ask(gate.find_model("a/m"))
    with pytest.raises(UpstreamUnavailable, match="resting") as caught:
        ask(gate.find_model("a/m"))
    assert caught.value.retry_after_s == 10 and len(strict.bodies) == 5


def test_retry_after_is_a_cool_down_with_a_limit() -> None:
    clock = Clock()
    a, b = FakeServer("a", [UpstreamRateLimited("slow down", retry_after_s=3600), True]), FakeServer("b")
    gate = routes(a, b, clock=clock, **virtual("a/m", "b/m"))
    assert [ask(gate.find_model("v")) for _ in range(3)] == ["b", "b", "b"]
    clock.now += 59
    assert ask(gate.find_model("v")) == "b"
    clock.now += 1.5
    assert ask(gate.find_model("v")) == "a"
    assert len(a.bodies) == 2


def test_when_all_of_several_rest_the_caller_is_told_how_long() -> None:
    servers = [
        FakeServer(name, [UpstreamRateLimited("slow down", retry_after_s=wait)]) for name, wait in (("a", 9), ("b", 4))
    ]
    gate = routes(*servers, **virtual("a/m", "b/m"))
    with pytest.raises(UpstreamRateLimited):
        ask(gate.find_model("v"))
    with pytest.raises(UpstreamUnavailable) as caught:
        ask(gate.find_model("v"))
    assert caught.value.retry_after_s == 4


def test_an_upstream_that_failed_its_health_check_comes_last() -> None:
    a, b = FakeServer("a"), FakeServer("b")
    gate = routes(a, b, **virtual("a/m", "b/m"))
    a.status.failed("no answer")
    assert ask(gate.find_model("v")) == "b"
    a.status.succeeded()
    assert ask(gate.find_model("v")) == "a"


def test_a_stream_moves_on_before_its_first_event_and_never_after() -> None:
    async def read(binding: RoutedBinding | None) -> list[bytes]:
        async with aclosing(bound(binding).upstream.chat_stream(BODY)) as events:
            return [event async for event in events]

    a, b = FakeServer("a", [UpstreamError("down")]), FakeServer("b")
    gate = routes(a, b, **virtual("a/m", "b/m"))
    assert asyncio.run(read(gate.find_model("v"))) == [b"b", b"end"]
    a.script, a.fails_after_first = [True], UpstreamIncomplete("cut")
    binding = bound(gate.find_model("v"))
    with pytest.raises(UpstreamIncomplete):
        asyncio.run(read(binding))
    assert len(b.bodies) == 1
    assert binding.upstream.route.candidates[0].health.in_flight == 0


def test_a_stream_that_is_left_counts_as_nothing() -> None:
    async def leave(binding: RoutedBinding) -> None:
        async with aclosing(binding.upstream.chat_stream(BODY)) as events:
            await anext(events)

    binding = bound(routes(FakeServer("a")).find_model("a/m"))
    asyncio.run(leave(binding))
    health = binding.upstream.route.candidates[0].health
    assert (health.in_flight, health.state) == (0, "closed")


def test_the_callers_choice_of_an_upstream() -> None:
    a, b, c = FakeServer("a"), FakeServer("b", [UpstreamError("down")]), FakeServer("c", models=("else",))
    gate = routes(a, b, c, **virtual("a/m", "b/m", fallbacks=["a/m"]))
    with pytest.raises(UpstreamError, match="down"):
        ask(gate.find_model("v", upstream="b"))
    assert ask(gate.find_model("b/m", upstream="a")) == "a"
    for upstream in ("c", "nobody"):
        with pytest.raises(UnsupportedValue, match="cannot be honoured"):
            gate.find_model("v", upstream=upstream)


def test_a_plain_name_reaches_only_what_the_key_reaches() -> None:
    gate = routes(FakeServer("a"), FakeServer("b"))
    assert ask(gate.find_shared("m", lambda id_: id_.startswith("b/"))) == "b"
    assert gate.find_shared("m", lambda id_: False) is None
    assert gate.find_shared("unknown", lambda id_: True) is None


def test_what_was_learnt_outlives_a_reload_but_not_a_reconfigured_upstream() -> None:
    server, router = FakeServer("a", [UpstreamError("down")]), Router(Metrics(), clock=Clock())
    gate = router.build(table(server))
    for _ in range(5):
        with pytest.raises(UpstreamError):
            ask(gate.find_model("a/m"))

    def state(gate: RouteTable) -> str:
        return bound(gate.find_model("a/m")).upstream.route.candidates[0].health.state

    assert state(router.build(table(server))) == "open"
    assert state(router.build(table(FakeServer("a")))) == "closed"


@given(st.floats(0, 0.2), st.lists(st.booleans(), max_size=300))
def test_retries_stay_within_their_share(share: float, tries: list[bool]) -> None:
    budget, first, retries = RetryBudget(share), 0, 0
    for is_retry in tries:
        if is_retry:
            retries += budget.spend()
        else:
            budget.earn()
            first += 1
        assert retries <= share * first + 1


@given(st.lists(st.sampled_from([UpstreamUnreachable, UpstreamError, None]), min_size=1, max_size=60))
def test_no_sequence_of_failures_multiplies_traffic(outcomes: list[type[GatewayError] | None]) -> None:
    script: list[GatewayError | bool] = [kind("x") if kind is not None else True for kind in outcomes]
    server = FakeServer("a", script)
    rule = {"attempts": 5, "backoff_s": 0}
    gate = routes(server, retry={"connect": rule, "server_error": rule})

    async def storm() -> None:
        for _ in range(40):
            with suppress(UpstreamError):
                await bound(gate.find_model("a/m")).upstream.chat(BODY)

    asyncio.run(storm())
    assert len(server.bodies) <= 40 * 1.2 + 1


def test_a_stand_in_that_failed_lately_is_asked_within_the_budget_until_it_has_proved_itself() -> None:
    clock = Clock()
    first, second = FakeServer("a", [UpstreamError("down")]), FakeServer("b", [UpstreamError("down"), True])
    gate = routes(
        first, second, clock=clock, breaker={"failures": 99, "open_s": 10}, retry_budget=0, **virtual("a/m", "b/m")
    )

    def asked() -> int:
        before = len(second.bodies)
        with suppress(UpstreamError):
            ask(gate.find_model("v"))
        return len(second.bodies) - before

    assert asked() == 1, "nothing is known against it"
    second.script.insert(0, UpstreamError("down"))
    assert [asked() for _ in range(4)] == [1, 0, 0, 0], "it failed twice, and there is no budget"
    clock.now += 10
    assert [asked() for _ in range(3)] == [1, 1, 1], "time heals, and each answer lets more through"


def test_calls_pass_on_to_a_stand_in_a_few_at_a_time_until_it_answers() -> None:
    first, second = FakeServer("a", [UpstreamError("down")]), FakeServer("b")
    gate = routes(first, second, breaker={"failures": 99}, retry_budget=0, **virtual("a/m", "b/m"))
    most = under_way = 0
    go = asyncio.Event()

    async def slowly(path: str, body: bytes, **options: Any) -> bytes:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await go.wait()
        under_way -= 1
        return b"b"

    async def main() -> list[bytes]:
        calls = [asyncio.create_task(bound(gate.find_model("v")).upstream.post("/x", BODY)) for _ in range(50)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert (under_way, most) == (5, 5)
        go.set()
        return await asyncio.gather(*calls)

    second.post = slowly  # type: ignore[method-assign]
    assert asyncio.run(main()) == [b"b"] * 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {v: {targets: [{model: nowhere/m}]}}", "must be 'upstream/model'"),
        ("models: {v: {targets: [{model: local}]}}", "Did you mean 'local/MODEL'"),
        ("models: {v: {fallbacks: [local/m]}}", "no targets"),
        ("models: {local/m: {fallbacks: [vv]}}", "fallbacks"),
        ("models: {'a b': {targets: [{model: local/m}]}}", "letters, digits"),
        ("retry_budget: 0.5", "retry_budget"),
        ("models: {v: {targets: [{model: local/m}, {model: local/n}], hedge: {}}}", "needs after_s"),
        ("models: {v: {targets: [{model: local/m}], hedge: {after_s: 1}}}", "two targets"),
        ("models: {local/m: {hedge: {after_s: 1}}}", "two targets"),
        ("models: {v: {targets: [{model: local/m}], hedge: {percentile: 100}}}", "percentile"),
        ("models: {v: {strategi: priority}}", "did you mean 'strategy'"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_routing(Settings(routing_config=path), ["local"])
    assert said in caught.value.message and caught.value.message.startswith("routing.yaml")
