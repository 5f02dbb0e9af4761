"""Prices, costs, sums and estimates: exact, and none where nothing is known."""

from __future__ import annotations

import asyncio
import uuid
from decimal import Decimal
from pathlib import Path

import pytest
from agents import Agent
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat import RelayRequest
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.events import Usage
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.run import Run
from gateway.usage.estimate import estimate_usage
from gateway.usage.measures import Measured, asked_of
from gateway.usage.meter import Meter
from gateway.usage.prices import PriceRow, PriceTable, load_prices, reported_cost, usd
from gateway.usage.reported import AnswerUsage
from tests.unit.sdk_fakes import Reply, World, run_async

ROWS = (
    PriceRow(match="openai/*", input=9, output=9),
    PriceRow(match="openai/mini*", input=1, output=1),
    PriceRow(
        match="openai/mini", input=1.5, cached_input=0.0375, output=6, reasoning=7, audio_input=40, audio_output=80
    ),
    PriceRow(match="local/embed", input=0.02),
)
TABLE = PriceTable(ROWS)


def test_the_exact_name_comes_first_then_patterns_in_order() -> None:
    asked = Usage(1, requests=1)
    assert TABLE.cost("openai", "mini", asked) == 1_500_000
    assert TABLE.cost("openai", "mini-2025", asked) == 9_000_000
    assert TABLE.cost("openai", "Mini", asked) == 9_000_000
    assert TABLE.cost("local", "other", asked) is None
    assert TABLE.cost("local", "other", asked) is None, "remembered"


def test_each_kind_of_token_has_its_price() -> None:
    usage = Usage(100, 50, 30, 20, 1, audio_input_tokens=10, audio_output_tokens=5)
    dollars = (Decimal("1.5") * 60 + Decimal("0.0375") * 30 + 40 * 10 + 6 * 25 + 7 * 20 + 80 * 5) / 1_000_000
    cost = TABLE.cost("openai", "mini", usage)
    assert cost is not None
    assert Decimal(usd(cost)) == dollars


def test_kinds_without_a_price_cost_what_the_whole_does() -> None:
    plain, told_apart = Usage(100, 50, requests=1), Usage(100, 50, 30, 20, 1, False, 10, 5)
    assert TABLE.cost("openai", "x", plain) == TABLE.cost("openai", "x", told_apart) == 150 * 9_000_000


def test_tokens_of_an_answer_without_a_price_have_no_known_cost() -> None:
    assert TABLE.cost("local", "embed", Usage(1_000, requests=1)) == 20_000_000
    assert TABLE.cost("local", "embed", Usage(1_000, 1, requests=1)) is None


TOKENS = st.integers(0, 10**9)
PRICES = st.integers(0, 10**11).map(lambda micro: micro / 10**6)


@given(TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, PRICES, PRICES, PRICES)
def test_the_parts_sum_up_whatever_the_upstream_says(
    i: int, o: int, c: int, r: int, ai: int, ao: int, p: float, q: float, s: float
) -> None:
    table = PriceTable([PriceRow(match="*", input=p, output=q, cached_input=s, reasoning=s)])
    cost = table.cost("u", "m", Usage(i, o, c, r, 1, False, ai, ao))
    cached, thought = min(c, i), min(r, o)
    parts = (i - cached) * Decimal(repr(p)) + (o - thought) * Decimal(repr(q)) + (cached + thought) * Decimal(repr(s))
    assert cost is not None
    assert Decimal(cost) == parts * 10**6
    assert Decimal(usd(cost)) == Decimal(cost).scaleb(-12)


COSTS = st.none() | st.integers(0, 10**15)
CALLS = st.lists(st.builds(Usage, TOKENS, TOKENS, requests=st.just(1), cost=COSTS), min_size=1, max_size=6)


@given(CALLS)
def test_a_run_costs_the_sum_of_its_calls_or_nothing_known(calls: list[Usage]) -> None:
    costs = [call.cost for call in calls]
    forwards, backwards = sum(calls, Usage()), sum(reversed(calls), Usage())
    assert forwards == backwards
    assert forwards.cost == (None if None in costs else sum(cost for cost in costs if cost is not None))


@pytest.mark.parametrize(
    ("said", "cost"),
    [
        (0, 0),
        (0.00014, 140_000_000),
        (2, 2 * 10**12),
        (1e-300, 0),
        *((odd, None) for odd in (-1, True, "1", None, float("nan"), float("inf"), 1e9)),
    ],
)
def test_what_an_upstream_may_report(said: object, cost: int | None) -> None:
    assert reported_cost(said) == cost


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (1, "0.000000000001"), (10**12, "1"), (123_400_000, "0.0001234"), (10**13 + 1, "10.000000000001")],
)
def test_dollars_are_written_exactly(amount: int, text: str) -> None:
    assert usd(amount) == text


def test_writing_to_the_upstreams_cache_has_a_price_of_its_own() -> None:
    table = PriceTable([PriceRow(match="*", input=3, cached_input=0.3, cache_write=3.75, output=15)])
    used = Usage(1_000, 10, cached_input_tokens=200, requests=1, cache_write_tokens=700)
    assert table.cost("a", "m", used) == (100 * 3_000_000 + 200 * 300_000 + 700 * 3_750_000 + 10 * 15_000_000)
    assert TABLE.cost("openai", "mini-2025", Usage(10, requests=1, cache_write_tokens=10)) == 90_000_000, "as input"
    assert (used + used).cache_write_tokens == 1_400


def test_prices_have_a_version_that_changes_with_them() -> None:
    assert TABLE.version == PriceTable(ROWS).version != PriceTable(ROWS[1:]).version


@pytest.mark.parametrize(
    ("kind", "pieces", "usage"),
    [
        (
            b"application/json",
            [
                b'{"created":1,"data":[{"b64_json":"' + b"A" * 100_000 + b'"}],"usa',
                b'ge":{"input_tokens":50,"output_tokens":90,"input_tokens_details":{"text_tokens":50}}}',
            ],
            Usage(50, 90, requests=1),
        ),
        (
            b"text/event-stream",
            [
                b'data: {"type":"transcript.text.delta","delta":"a"}\n\n',
                b'data: {"type":"transcript.text.done","text":"\\"usage\\": {","usage":{"type":"tokens",'
                b'"input_tokens":14,"input_token_details":{"audio_tokens":10},"output_tokens":3,"cost":0.5}}\n\n',
            ],
            Usage(14, 3, requests=1, audio_input_tokens=10, cost=5 * 10**11, cost_reported=True),
        ),
        (b"application/json", [b'{"text":"hi","usage":{"type":"duration","seconds":9}}'], None),
        (b"application/json", [b'{"text":"\\"usage\\": {\\"input_tokens\\": 5}"}'], None),
        (b"application/json", [b'{"usage":{"input_tokens":-5,"output_tokens":1}}'], None),
        (b"application/json", [b'{"usage":{"input_tokens":9000000000000000000,"output_tokens":1}}'], None),
        (b"application/json", [b'{"usage":{"input_tokens":1'], None),
        (b"audio/mpeg", [b'"usage":{"input_tokens":1,"output_tokens":1}'], None),
        (None, [], None),
    ],
)
def test_what_an_answer_in_bytes_says_of_its_usage(
    kind: bytes | None, pieces: list[bytes], usage: Usage | None
) -> None:
    answer = AnswerUsage(kind)
    for piece in pieces:
        answer.feed(piece)
    assert answer.find() == usage


def test_pictures_that_are_too_large_to_hold_are_counted() -> None:
    answer = AnswerUsage(b"application/json")
    body = b'{"created":1,"data":[' + b",".join([b'{"b64_json":"' + b"A" * 5_000 + b'"}'] * 4) + b"]}"
    for start in range(0, len(body), 997):
        answer.feed(body[start : start + 997])
    assert answer.measured().images == 4


def test_of_a_form_that_has_not_come_whole_the_worst_is_thought() -> None:
    asked = asked_of("/images/edits", {}, is_whole=False)
    assert (asked.most().images, asked.is_promised) == (10, False)
    asked = asked_of("/images/edits", {"n": "2", "size": "1x1"}, is_whole=True)
    assert (asked.most(), asked.is_promised) == (Measured(2, "1x1"), True)
    asked = asked_of("/audio/transcriptions", {}, 60_000)
    assert (asked.most(), asked.is_promised) == (Measured(milliseconds=60_000), False)


def test_an_estimate_says_that_it_is_one() -> None:
    assert estimate_usage(400, 9) == Usage(100, 3, requests=1, estimated=True)


_RUN = Run(
    uuid.uuid4(), "request", Principal("k", "k", ("*",)), "r", RelayRequest(model="r", fields={}), False, 1, 60.0
)


async def rendered(metrics: Metrics) -> str:
    return b"".join([piece async for piece in metrics.render()]).decode()


def test_the_word_of_the_upstream_counts_before_the_prices() -> None:
    metrics = Metrics()
    meter = Meter(TABLE, metrics)
    said = Usage(10, 5, requests=1, cost=7, cost_reported=True)
    assert meter.charge(said, _RUN, upstream="openai", model="mini") == said
    priced = meter.charge(Usage(2, requests=1), _RUN, upstream="local", model="embed", path="/embeddings")
    assert priced == Usage(2, requests=1, cost=40_000)
    free = Usage(1, 1, requests=1)
    assert meter.charge(free, _RUN, upstream="nobody", model="m") is free
    text = asyncio.run(rendered(metrics))
    found = [line for line in text.splitlines() if line.startswith("gen_ai_client_cost_total{")]
    assert found == [
        'gen_ai_client_cost_total{operation_name="chat",provider_name="openai",request_model="r"} 7e-12',
        'gen_ai_client_cost_total{operation_name="embeddings",provider_name="local",request_model="r"} 4e-08',
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{match: a/b, input: 1, ouput: 2}]", "did you mean 'output'"),
        ("models: [{match: a/b}]", "input"),
        ("models: [{match: a/b, input: -1}]", "input"),
        ("models: [{match: a/b, input: .nan}]", "input"),
        ("models: [{match: a/b, input: 1.0000001}]", "six decimals"),
        ("models: [{match: a/b, image: .04, output: 1}]", "set input"),
        ("models: [{match: a/b, images: [{size: 1x1}]}]", "price"),
        ("models: [{match: a/b, input: 1}, {match: a/b, input: 2}]", "twice"),
        ("currency: EUR", "currency"),
        ("version: 2", "version"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_prices(Settings(prices_config=path))
    assert said in caught.value.message and caught.value.message.startswith("prices.yaml")


def test_the_file_that_ships_has_no_prices() -> None:
    table = load_prices(Settings(agent_path=Path("nowhere/agents")))
    assert table.cost("openai", "gpt-5-mini", Usage(1, 1, requests=1)) is None


def test_the_examples_of_the_file_that_ships_are_right(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "src" / "config" / "prices.yaml").read_text(encoding="utf-8")
    head, _, examples = text.partition("\n# models:\n")
    lines = [line.removeprefix("# ").removeprefix("#") for line in examples.splitlines()]
    path = tmp_path / "prices.yaml"
    path.write_text("models:\n" + "\n".join(lines), encoding="utf-8")
    assert "models: []" in head
    assert load_prices(Settings(prices_config=path)).cost("local", "any", Usage(1, 1, requests=1)) == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agents_calls_are_priced(streamed: bool) -> None:
    world = World("ok")
    meter = Meter(PriceTable([PriceRow(match="*/default-model", input=2, output=10)]), world.metrics)
    world.services = type(world.services)(world.services.upstreams, world.metrics, Settings(), lambda: meter)
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert answer.end.usage == Usage(10, 5, requests=1, cost=10 * 2_000_000 + 5 * 10_000_000)


def test_a_cost_that_an_agents_upstream_reports_is_taken() -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"audio_tokens": 3},
        "completion_tokens_details": {"audio_tokens": 2},
        "cost": 0.25,
    }
    world = World(Reply("ok", usage=usage))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a")))
    assert answer.end.usage == Usage(10, 5, 0, 0, 1, False, 3, 2, 25 * 10**10, True)
