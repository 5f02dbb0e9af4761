"""What calls cost, by a real gateway over two scripted upstreams: headers, log, metric, and prices that change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import ADMIN, SECURITY, write_agent
from tests.support.scripted_answers import LAST, STREAM_HEAD, Answer, Call, sse, status
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

UPSTREAMS = """\
version: 1
upstreams:
  - name: first
    base_url: {first}
    models: [m, plain, free, embed, 'wild-*', by-image, by-characters, by-minute, by-request]
    default_model: m
  - {{name: second, base_url: {second}, models: [n], default_model: n, priority: 2}}
  - {{name: answers, base_url: {second}, api: responses, models: [r], default_model: r, priority: 3}}
"""
ROUTING = """\
version: 1
models:
  both: {targets: [{model: first/m}, {model: second/n}]}
breaker: {failures: 1000, open_s: 1}
health_interval_s: 3600
"""
PRICES = """\
version: 1
models:
  - {match: first/m, input: 1, output: 1}
  - {match: second/n, input: 2, cached_input: 0.5, output: 10, reasoning: 20}
  - {match: answers/*, input: 3, output: 3}
  - {match: first/embed, input: 0.02}
  - {match: first/plain*, input: 1, output: 1}
  - {match: first/by-image, image: 0.04, images: [{size: 1024x1792, quality: hd, price: 0.12}]}
  - {match: first/by-characters, characters: 15}
  - {match: first/by-minute, minute: 0.006, input: 2, output: 4}
  - {match: first/by-request, request: 0.001}
"""
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
DETAILED = {
    **USAGE,
    "prompt_tokens_details": {"cached_tokens": 40},
    "completion_tokens_details": {"reasoning_tokens": 4},
}
TOOL = "from agents import function_tool\n\n@function_tool\ndef note(text: str) -> str:\n    return text\n\n"


class House:
    def __init__(self, gateway: Gateway, first: ScriptedUpstream, second: ScriptedUpstream) -> None:
        self.gateway, self.first, self.second = gateway, first, second

    def ask(self, model: str, *, streamed: bool = False) -> Any:
        body = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": "Hello"}]}
        answer = self.gateway.post("/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        return answer

    def finished(self, answer: Any) -> Mapping[str, Any]:
        """The log line of the run that gave an answer."""
        return self.gateway.logged("run.finished", request_id=answer.headers["x-request-id"])[0]

    def spent(self, model: str, upstream: str, operation: str = "chat") -> float:
        """What the metric says."""
        labels = f'operation_name="{operation}",provider_name="{upstream}",request_model="{model}"'
        name = f"gen_ai_client_cost_total{{{labels}}} "
        text = self.gateway.get("/metrics/prometheus").body.decode()
        return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("usage")
    with ScriptedUpstream() as first, ScriptedUpstream() as second:
        text = UPSTREAMS.format(first=first.base_url, second=second.base_url)
        (home / "upstreams.yaml").write_text(text, encoding="utf-8")
        (home / "routing.yaml").write_text(ROUTING, encoding="utf-8")
        (home / "prices.yaml").write_text(PRICES, encoding="utf-8")
        (home / "security.yaml").write_text(SECURITY.replace("HIDE", "false"), encoding="utf-8")
        write_agent(
            home / "agents", "Tooled", "Help.", extra=f'{TOOL}__gateway__ = {{"model": "both"}}\n', tools="note"
        )
        write_agent(home / "agents", "Plain", "Help.", extra='__gateway__ = {"model": "plain"}\n')
        write_agent(home / "agents", "Speaker", "Help.", extra='__gateway__ = {"model": "answers/r"}\n')
        write_agent(home / "agents", "Thinker", "Help.", extra='__gateway__ = {"model": "second/n"}\n')
        write_agent(home / "agents", "Free", "Help.", extra='__gateway__ = {"model": "free"}\n')
        env = {"GATEWAY_AGENT_AUTO_RELOAD": "1", "GATEWAY_PRICES_CONFIG": str(home / "prices.yaml")}
        with running_gateway(home, env=env, key=ADMIN) as gateway:
            wait_for(lambda: len(gateway.listing()) == 5, what="the agents are there")
            yield House(gateway, first, second)


@pytest.mark.parametrize("streamed", [False, True])
def test_each_turn_of_an_agent_costs_what_its_own_upstream_asks(house: House, streamed: bool) -> None:
    before = house.spent("default/tooled", "first"), house.spent("default/tooled", "second")
    house.first.enqueue(Answer(calls=[Call("note", {"text": "x"})], usage=USAGE), status(500))
    house.second.enqueue(Answer(text="Done.", usage=DETAILED))
    answer = house.ask("default/tooled", streamed=streamed)
    first = 110 * 1
    second = 60 * 2 + 40 * 0.5 + 6 * 10 + 4 * 20
    log = house.finished(answer)
    assert log["cost_usd"] == (first + second) / 1e6
    counted = (log["input_tokens"], log["output_tokens"], log["cached_input_tokens"], log["reasoning_tokens"])
    assert counted == (200, 20, 40, 4)
    assert (log["usage_estimated"], log["cost_reported"]) == (False, False)
    assert answer.headers.get("x-gateway-cost-usd") == (None if streamed else "0.00039")
    assert "x-gateway-usage-estimated" not in answer.headers
    after = house.spent("default/tooled", "first"), house.spent("default/tooled", "second")
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([first / 1e6, second / 1e6])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_raw_call_after_a_failover_is_priced_by_who_answered(house: House, streamed: bool) -> None:
    house.first.enqueue(status(500))
    house.second.enqueue(Answer(text="Here.", usage=DETAILED))
    before = house.spent("both", "second")
    answer = house.ask("both", streamed=streamed)
    assert house.finished(answer)["cost_usd"] == 280 / 1e6
    assert answer.headers.get("x-gateway-cost-usd") == (None if streamed else "0.00028")
    assert house.spent("both", "second") - before == pytest.approx(280 / 1e6)
    assert house.spent("both", "first") == 0


def test_a_name_that_a_client_made_up_is_counted_under_the_pattern_that_let_it_through(house: House) -> None:
    for model in ("first/wild-a", "first/wild-b", "first/m"):
        house.finished(house.ask(model))
    text = house.gateway.get("/metrics/prometheus").body.decode()
    assert 'agent_gateway_runs_total{model="first/wild-*",outcome="success"} 2.0' in text
    assert 'agent_gateway_runs_total{model="first/m",outcome="success"}' in text
    assert "wild-a" not in text


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_on_the_responses_surface(house: House, streamed: bool) -> None:
    house.second.enqueue(Answer(text="Spoken."))
    answer = house.ask("default/speaker", streamed=streamed)
    log = house.finished(answer)
    assert (log["outcome"], log.get("input_tokens"), log.get("cost_usd")) == ("success", 11, 18 * 3 / 1e6), answer.body


def test_embeddings(house: House) -> None:
    vector = {"object": "embedding", "index": 0, "embedding": [0.5]}
    usage = {"prompt_tokens": 50, "total_tokens": 50}
    house.first.enqueue(Answer(body={"object": "list", "data": [vector], "model": "embed", "usage": usage}))
    answer = house.gateway.post("/v1/embeddings", {"model": "first/embed", "input": "Hello"})
    assert answer.status == 200, answer.body
    assert answer.headers["x-gateway-cost-usd"] == "0.000001"
    assert house.spent("first/embed", "first", "embeddings") == pytest.approx(1e-6)


ENGLISH = "x" * 90
PICTURES: dict[str, Any] = {"created": 1, "data": [{"b64_json": "AA=="}, {"b64_json": "AA=="}]}
TALL = {"size": "1024x1792", "quality": "hd"}
SUBTITLES = {"body": b"1\n00:00:00,000 --> 00:00:30,000\nHello\n", "headers": {"content-type": "text/plain"}}
BY_TOKENS = {"type": "tokens", "input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
IN_BYTES: dict[str, tuple[str, str, dict[str, Any], Mapping[str, Any], str, bool]] = {
    "as many pictures as came": ("by-image", "images/generations", {"n": 3}, {"body": PICTURES}, "0.08", False),
    "as many pictures as were asked for": (
        "by-image", "images/generations", {"n": 3}, {"body": {"created": 1}}, "0.12", True,
    ),
    "pictures of a kind": (
        "by-image", "images/generations", TALL, {"body": PICTURES}, "0.24", False,
    ),
    "what the answer says of its kind": (
        "by-image", "images/generations", {}, {"body": PICTURES | TALL}, "0.24", False,
    ),
    "characters": (
        "by-characters", "audio/speech", {"input": "hé" * 50},
        {"body": b"RIFF", "headers": {"content-type": "audio/wav"}}, "0.0015", True,
    ),
    "seconds of usage": (
        "by-minute", "audio/transcriptions", {}, {"body": {"text": "a", "usage": {"seconds": 90}}}, "0.009", False,
    ),
    "tokens before seconds": (
        "by-minute", "audio/transcriptions", {}, {"body": {"text": "a", "duration": 90, "usage": BY_TOKENS}},
        "0.00024", False,
    ),
    "a duration": ("by-minute", "audio/translations", {}, {"body": {"text": "a", "duration": 30}}, "0.003", False),
    "subtitles": ("by-minute", "audio/transcriptions", {"response_format": "srt"}, SUBTITLES, "0.003", False),
    "a text": ("by-minute", "audio/transcriptions", {}, {"body": {"text": ENGLISH}}, "0.0006", True),
    "requests": ("by-request", "moderations", {"input": "x"}, {"body": {"id": "m", "results": []}}, "0.001", False),
}  # fmt: skip


def form(fields: Mapping[str, Any]) -> bytes:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{fields[name]}\r\n' for name in fields]
    file = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
    return "".join([*parts, file]).encode()


@pytest.mark.parametrize("case", IN_BYTES)
def test_what_is_not_counted_in_tokens(house: House, case: str) -> None:
    name, path, fields, says, cost, estimated = IN_BYTES[case]
    model, operation = f"first/{name}", "other"
    before = house.spent(model, "first", operation)
    house.first.enqueue(Answer(**says))
    if path.startswith("audio/tr"):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        body = form({"model": model, **fields})
        answer = house.gateway.request("POST", f"/v1/{path}", body=body, headers=headers)
    else:
        answer = house.gateway.post(f"/v1/{path}", {"model": model, **fields})
    assert answer.status == 200, answer.body
    log = house.finished(answer)
    assert (log["cost_usd"], log["usage_estimated"]) == (float(cost), estimated)
    assert house.spent(model, "first", operation) - before == pytest.approx(float(cost))
    shown = None if "subtitles" in case else cost  # a text that is not JSON is passed on before its end
    assert answer.headers.get("x-gateway-cost-usd") == shown
    assert ("x-gateway-usage-estimated" in answer.headers) == estimated
    request_id = answer.headers["x-request-id"]

    def written() -> list[dict[str, Any]]:
        rows = house.gateway.get("/usage?group_by=none&limit=20").json()["data"]
        return [row for row in rows if row["request_id"] == request_id]

    (row,) = wait_for(written, what="the row is written")
    assert row["cost_usd"] == cost


def test_a_stream_of_pictures_costs_what_was_finished(house: House) -> None:
    events = [
        {"type": "image_generation.partial_image", "b64_json": "AA=="},
        {"type": "image_generation.completed", "b64_json": "AA=="},
    ]
    house.first.enqueue(Answer(steps=lambda _: [STREAM_HEAD, *sse(*events), LAST]))
    answer = house.gateway.post("/v1/images/generations", {"model": "first/by-image", "n": 1, "stream": True})
    assert b"image_generation.completed" in answer.body
    assert house.finished(answer)["cost_usd"] == 0.04


@pytest.mark.parametrize("model", ["first/free", "default/free"])
@pytest.mark.parametrize("streamed", [False, True])
def test_without_a_price_there_is_no_cost(house: House, model: str, streamed: bool) -> None:
    house.first.enqueue(Answer(text="Free.", usage=USAGE))
    answer = house.ask(model, streamed=streamed)
    assert not [name for name in answer.headers if name.startswith(("x-gateway-cost", "x-gateway-usage"))]
    assert house.finished(answer).get("cost_usd") is None
    assert house.spent(model, "first") == 0


@pytest.mark.parametrize("model", ["first/free", "first/plain", "default/free"])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_upstream_reports_wins_and_is_marked(house: House, model: str, streamed: bool) -> None:
    house.first.enqueue(Answer(text="Paid.", usage={**USAGE, "cost": 0.0125}))
    answer = house.ask(model, streamed=streamed)
    log = house.finished(answer)
    assert (log["cost_usd"], log["cost_reported"]) == (0.0125, True)
    if not streamed:
        assert (answer.headers["x-gateway-cost-usd"], answer.headers["x-gateway-cost-reported"]) == ("0.0125", "true")


@pytest.mark.parametrize("model", ["first/plain", "default/plain"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_estimate_is_marked(house: House, model: str, streamed: bool) -> None:
    house.first.enqueue(Answer(text="twelve chars", usage=None))
    answer = house.ask(model, streamed=streamed)
    log = house.finished(answer)
    sent = len(house.first.requests[-1].body) // 4
    assert (log["usage_estimated"], log["input_tokens"], log["output_tokens"]) == (True, sent, 3)
    assert log["cost_usd"] == (sent + 3) / 1e6
    assert answer.headers.get("x-gateway-usage-estimated") == (None if streamed else "true")


@pytest.mark.parametrize("model", ["second/n", "default/thinker"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("details", "thought", "written"),
    [
        ({"total_tokens": 150}, 40, 50),  # as Gemini says it
        ({**DETAILED, "total_tokens": 114}, 4, 14),  # as xAI does
        ({**DETAILED, "total_tokens": 150}, 4, 10),  # the rest may be anything
        ({**DETAILED, "total_tokens": 20}, 4, 10),
        ({"total_tokens": 110}, 0, 10),
    ],
)
def test_thoughts_that_are_counted_apart_are_part_of_the_answer(
    house: House, model: str, streamed: bool, details: dict[str, Any], thought: int, written: int
) -> None:
    house.second.enqueue(Answer(text="Thought.", usage={**USAGE, **details}))
    log = house.finished(house.ask(model, streamed=streamed))
    assert (log["input_tokens"], log["output_tokens"], log["reasoning_tokens"]) == (100, written, thought)
    read = 100 * 2 if "prompt_tokens_details" not in details else 60 * 2 + 40 * 0.5
    assert log["cost_usd"] == pytest.approx((read + (written - thought) * 10 + thought * 20) / 1e6)


@pytest.mark.parametrize("model", ["first/plain", "default/plain"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "odd",
    [
        {"completion_tokens": 7.5},
        {"completion_tokens": -4},
        {"prompt_tokens": 10**30},
        {"completion_tokens": 10**12 + 1},
        {"prompt_tokens_details": {"cached_tokens": "x"}},
        {"prompt_tokens_details": {"cached_tokens": -5}},
        {"prompt_tokens_details": "none"},
        {"completion_tokens_details": [1]},
    ],
)
def test_what_cannot_be_usage_counts_as_none(house: House, model: str, streamed: bool, odd: dict[str, Any]) -> None:
    house.first.enqueue(Answer(text="twelve chars", usage={**USAGE, **odd}))
    log = house.finished(house.ask(model, streamed=streamed))
    sent = len(house.first.requests[-1].body) // 4
    assert (log["outcome"], log["usage_estimated"]) == ("success", True)
    assert (log["input_tokens"], log["output_tokens"]) == (sent, 3)


def test_prices_are_reloaded_and_a_bad_file_keeps_the_old(house: House) -> None:
    path: Path = house.gateway.home / "prices.yaml"

    def cost() -> str | None:
        house.first.enqueue(Answer(text="x", usage=USAGE))
        shown: str | None = house.ask("first/plain").headers.get("x-gateway-cost-usd")
        return shown

    assert cost() == "0.00011"
    path.write_text(PRICES.replace("first/plain*, input: 1,", "first/plain*, input: 5,"), encoding="utf-8")
    wait_for(lambda: cost() == "0.00051", what="the new price counts")
    path.write_text("models: [{match: first/plain, inptu: 1}]", encoding="utf-8")
    house.gateway.logged("config.reload.failed", file="prices.yaml")
    answer = house.gateway.post("/upstreams/refresh", {})
    assert answer.status == 400 and "'input'" in answer.error["message"], answer.body
    assert cost() == "0.00051"
    path.write_text(PRICES, encoding="utf-8")
    wait_for(lambda: cost() == "0.00011", what="the old price counts again")
