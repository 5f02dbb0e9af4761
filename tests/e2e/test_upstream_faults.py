"""Every fault of an upstream, through an agent and through a raw model, plain and streamed: never a success."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from openai import OpenAI

from tests.support.house import ADMIN, UPSTREAM_KEY, furnish, write_agent
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error
from tests.support.scripted_answers import FRAME, LAST, STREAM_HEAD, Answer, chunk, sse
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway

AGENT, RAW = "default/weatheragent", "local/test-model"

FAULTS: dict[str, tuple[int, str | None]] = {
    "[status=400 param=temperature code=bad_thing] say Your temperature is wrong": (400, "bad_thing"),
    "[status=400 param=messages code=context_length_exceeded] say Too long": (400, "context_length_exceeded"),
    "[status=401] say No thanks": (502, "upstream_auth_error"),
    "[status=403] say No thanks": (502, "upstream_auth_error"),
    "[status=404] say No thanks": (502, "upstream_model_not_found"),
    "[status=413] say No thanks": (413, None),
    "[status=429 retry=7 code=rate_limit_exceeded] say No thanks": (429, "rate_limit_exceeded"),
    "[status=500] say No thanks": (502, "upstream_error"),
    "[status=502] say No thanks": (502, "upstream_error"),
    "[status=503] say No thanks": (503, "upstream_unavailable"),
    "[status=504] say No thanks": (502, "upstream_error"),
    "[fault=resetnow] say x": (502, "upstream_unreachable"),
    "[fault=closenow] say x": (502, "upstream_unreachable"),
    "[fault=html] say x": (502, "upstream_malformed"),
    "[fault=empty] say x": (502, None),
    "[fault=badjson] say x": (502, None),
    "[fault=badutf8] say x": (502, "upstream_malformed"),
    "[fault=gzip] say x": (502, "upstream_malformed"),
    "[fault=redirect] say x": (502, "upstream_error"),
    "[fault=cut] say one two three four": (502, "upstream_incomplete"),
    "[fault=nofinish] say one two three four": (502, "upstream_incomplete"),
}
"""The first turn of a conversation, and what the client of an *unstreamed* call sees."""

LONG_BEFORE_ANOTHER_DEADLINE_S = 20.0
BEFORE_ANY_TOKEN = [script for script in FAULTS if "fault=cut" not in script and "nofinish" not in script]


def ask(gateway: Gateway, model: str, text: str, *, streamed: bool = False, **options: Any) -> Any:
    request = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": text}]}
    return gateway.post("/v1/chat/completions", request, **options)


@pytest.mark.parametrize("model", [AGENT, RAW])
@pytest.mark.parametrize("script", FAULTS)
def test_plain(gateway: Gateway, model: str, script: str) -> None:
    status, code = FAULTS[script]
    answer = ask(gateway, model, script)
    assert answer.status == status, answer.body
    assert_error(answer.json())
    if code:
        assert answer.error["code"] == code
    assert_says_nothing_of_the_inside(gateway, answer.body.decode())
    if status == 429:
        assert answer.headers["retry-after"] == "7"
        assert answer.error["type"] == "rate_limit_error"


@pytest.mark.parametrize("model", [AGENT, RAW])
@pytest.mark.parametrize("script", BEFORE_ANY_TOKEN)
def test_streamed_before_any_token(gateway: Gateway, model: str, script: str) -> None:
    status, code = FAULTS[script]
    answer = ask(gateway, model, script, streamed=True)
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert_error(answer.json())
    if code:
        assert answer.error["code"] == code
    assert_says_nothing_of_the_inside(gateway, answer.body.decode())


def test_the_upstreams_word_about_the_clients_own_field_is_passed_on(gateway: Gateway) -> None:
    script = "[status=400 param=temperature code=bad_thing] say Your temperature is wrong"
    for model in (AGENT, RAW):
        answer = ask(gateway, model, script)
        assert "Your temperature is wrong" in answer.error["message"]
        assert answer.error["param"] == "temperature"


@pytest.mark.parametrize("model", ["default/gone", "gone/gone-model"])
@pytest.mark.parametrize("streamed", [False, True])
def test_refused_connection(gateway: Gateway, model: str, streamed: bool) -> None:
    answer = ask(gateway, model, "say x", streamed=streamed)
    assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")
    assert_error(answer.json())
    assert_says_nothing_of_the_inside(gateway, answer.body.decode())


@pytest.mark.parametrize("model", ["default/hasty", "hasty/hasty-model"])
def test_an_upstream_that_never_answers_is_given_up_in_time(gateway: Gateway, model: str) -> None:
    started = time.monotonic()
    answer = ask(gateway, model, "[fault=hang] say x")
    assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert time.monotonic() - started < LONG_BEFORE_ANOTHER_DEADLINE_S
    assert_error(answer.json())


@pytest.mark.parametrize("model", ["default/hasty", "hasty/hasty-model"])
@pytest.mark.parametrize("fault", ["stall", "comments"])
def test_a_stream_that_stops_or_only_comments_is_given_up_in_time(gateway: Gateway, model: str, fault: str) -> None:
    started = time.monotonic()
    answer = ask(gateway, model, f"[fault={fault} at=3] say one two three four", streamed=True)
    assert time.monotonic() - started < LONG_BEFORE_ANOTHER_DEADLINE_S
    events = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] != "[DONE]"
    error = json.loads(events[-1])
    assert_error(error)
    assert error["error"]["code"] == "upstream_timeout"


@pytest.mark.parametrize("model", [AGENT, RAW])
def test_an_endless_line_is_cut_and_memory_stays(gateway: Gateway, model: str) -> None:
    before = gateway.rss_mb()
    answer = ask(gateway, model, "[fault=endlessline at=2] say one two three", streamed=True)
    events = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "upstream_malformed"
    assert gateway.rss_mb() - before < 60


def test_an_agent_explains_a_limit_that_its_upstream_does_not(gateway: Gateway) -> None:
    answer = ask(gateway, AGENT, "[status=429 retry=3] say No thanks")
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )


@pytest.mark.parametrize("retry", ["1", "86400", "garbage", "-5"])
def test_only_a_sane_retry_after_is_passed_on(gateway: Gateway, retry: str) -> None:
    answer = ask(gateway, RAW, f"[status=429 retry={retry}] say slow down")
    assert answer.status == 429
    if "retry-after" in answer.headers:
        assert 0 <= float(answer.headers["retry-after"]) <= 86400
    else:
        assert retry in ("garbage", "-5", "86400")


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_our_key_is_masked_where_an_upstream_says_it_back(gateway: Gateway, status: int) -> None:
    for model in (AGENT, RAW):
        answer = ask(gateway, model, f"[status={status}] say I do not like {UPSTREAM_KEY} today")
        assert answer.status == status if status != 500 else answer.status == 502
        assert UPSTREAM_KEY not in answer.body.decode()


def test_a_fault_in_the_second_turn_of_an_agent_is_an_error_too(gateway: Gateway) -> None:
    script = 'call get_weather {"city":"Faro"} ;; [status=500] say No thanks'
    for streamed in (False, True):
        answer = ask(gateway, AGENT, script, streamed=streamed)
        assert answer.status == 502, answer.body
        assert answer.error["code"] == "upstream_error"


def test_the_upstream_is_asked_once_not_three_times(gateway: Gateway, upstream: ObedientUpstream) -> None:
    for model in (AGENT, RAW):
        ask(gateway, model, f"[status=500] say asked once {model}")
        assert len(upstream.find(f"asked once {model}")) == 1


def test_other_requests_are_unharmed_while_upstreams_fail(
    gateway: Gateway, client: OpenAI, upstream: ObedientUpstream
) -> None:
    request = {
        "model": AGENT,
        "stream": True,
        "messages": [{"role": "user", "content": "[hold=3] say one two three unharmed"}],
    }
    with gateway.stream("POST", "/v1/chat/completions", json_body=request) as stream:
        chunks = stream.chunks()
        next(chunks)
        for script in ("[fault=resetnow] say x", "[fault=html] say x", "[fault=cut] say one two", "[status=500] say x"):
            ask(gateway, AGENT, script)
            ask(gateway, RAW, script, streamed=True)
        upstream.find("three unharmed")[-1].release()
        rest = list(chunks)
    assert "unharmed" in json.dumps(rest)
    assert rest[-1]["choices"][0]["finish_reason"] == "stop"
    answer = client.chat.completions.create(model=AGENT, messages=[{"role": "user", "content": "say still well"}])
    assert answer.choices[0].message.content == "still well"


def assert_says_nothing_of_the_inside(gateway: Gateway, text: str) -> None:
    """No key, stack, server path or header of the upstream, and no word of its own failures."""
    for secret in (UPSTREAM_KEY, "canary", "Traceback", "site-packages", ".py", str(gateway.home), "127.0.0.1"):
        assert secret not in text, f"{secret!r} leaks: {text}"


CALL = {"id": "call_1", "type": "function", "function": {"name": "note", "arguments": "{}"}}
ODD: dict[str, dict[str, Any]] = {
    "content": {"content": 5},
    "calls": {"content": "hi", "tool_calls": [None]},
    "arguments": {
        "content": None,
        "tool_calls": [{**CALL, "index": 0, "function": {"name": "n", "arguments": {"a": 1}}}],
    },
    "call-id": {"content": None, "tool_calls": [{**CALL, "index": 0, "id": 7}]},
    "reasoning": {"content": "hi", "reasoning_content": ["a"]},
    "refusal": {"content": "hi", "refusal": 5},
}
"""Messages at which the SDK stumbles."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, ScriptedUpstream]]:
    home = tmp_path_factory.mktemp("odd")
    with ScriptedUpstream() as server:
        furnish(home, server.base_url)
        config = (home / "upstreams.yaml").read_text(encoding="utf-8")
        answers = f"  - {{name: answers, base_url: '{server.base_url}', api: responses, models: [r]}}\n"
        (home / "upstreams.yaml").write_text(config.replace("aliases:", f"{answers}aliases:"), encoding="utf-8")
        write_agent(home / "agents", "Speaker", "Help.", extra='__gateway__ = {"model": "answers/r"}\n')
        write_agent(home / "agents", "Plain", "Help.", extra='__gateway__ = {"model": "local/test-model"}\n')
        with running_gateway(home, key=ADMIN) as gateway:
            yield gateway, server


def stream_of(*chunks: Mapping[str, Any]) -> Answer:
    return Answer(steps=lambda streamed: [STREAM_HEAD, *sse(*chunks, b"[DONE]"), LAST])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_an_agent_is_not_blamed_for_an_answer_of_an_unknown_shape(
    odd: tuple[Gateway, ScriptedUpstream], name: str, streamed: bool
) -> None:
    gateway, server = odd
    message = {"role": "assistant", **ODD[name]}
    whole = {**FRAME, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    server.enqueue(stream_of(chunk(message), chunk({}, "stop")) if streamed else Answer(body=whole))
    answer = ask(gateway, "default/plain", "hi", streamed=streamed)
    assert "upstream_malformed" in answer.body.decode(), answer.body
    if answer.status == 200:
        assert streamed and "[DONE]" not in answer.body.decode()
    else:
        assert answer.status == 502
        assert_error(answer.json())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "item",
    [
        {"type": "of-next-year", "id": "x"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": "hi"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "note", "arguments": {"a": 1}},
        None,
    ],
    ids=str,
)
def test_nor_for_an_item_of_an_unknown_shape(
    odd: tuple[Gateway, ScriptedUpstream], item: dict[str, Any] | None, streamed: bool
) -> None:
    gateway, server = odd
    response = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "r",
        "status": "completed",
        "output": [item],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }
    ended = {"type": "response.completed", "sequence_number": 0, "response": response}
    server.enqueue(stream_of(ended) if streamed else Answer(body=response))
    answer = ask(gateway, "default/speaker", "hi", streamed=streamed)
    assert (answer.status, answer.error["code"]) == (502, "upstream_malformed"), answer.body


@pytest.mark.parametrize("model", ["default/plain", RAW])
def test_a_choice_without_a_delta_says_nothing(odd: tuple[Gateway, ScriptedUpstream], model: str) -> None:
    """As Azure sends it when its content filter runs beside the answer."""
    gateway, server = odd
    filtered = {**FRAME, "choices": [{"index": 0, "finish_reason": None, "content_filter_results": {}}]}
    server.enqueue(stream_of(chunk({"role": "assistant", "content": "Hi."}), filtered, chunk({}, "stop"), filtered))
    answer = ask(gateway, model, "hi", streamed=True)
    assert answer.status == 200
    assert "Hi." in answer.body.decode() and answer.body.endswith(b"data: [DONE]\n\n")
