"""The wire rules of a streamed answer, read byte by byte, and every event against the official schema."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, drop, furnish, write_agent
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_chunk, assert_completion, assert_error
from tests.support.server import Gateway, running_gateway

MODELS = ["default/weatheragent", "local/test-model"]


def body(model: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "stream": True, "messages": [{"role": "user", "content": text}]} | fields


def read(gateway: Gateway, request: dict[str, Any]) -> tuple[list[dict[str, Any]], bool, list[str]]:
    """Read a stream to its end: events, whether it ended with [DONE], all lines."""
    with gateway.stream("POST", "/v1/chat/completions", json_body=request) as stream:
        assert stream.status == 200, stream.raw.read()
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = list(stream.lines())
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data:")]
    done = bool(data) and data[-1] == "[DONE]"
    assert "[DONE]" not in data[:-1]
    return [json.loads(d) for d in data if d != "[DONE]"], done, lines


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c.get("choices"))


@pytest.mark.parametrize("model", MODELS)
def test_one_id_role_first_finish_last_done(gateway: Gateway, model: str) -> None:
    chunks, done, lines = read(gateway, body(model, "say one two three"))
    for chunk in chunks:
        assert_chunk(chunk)
    assert done
    assert len({c["id"] for c in chunks}) == 1
    assert {c["model"] for c in chunks} == {model}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert text_of(chunks) == "one two three"
    assert sum(bool(c["choices"][0]["delta"].get("content")) for c in chunks) == 3, "real tokens, one event each"
    assert all("usage" not in c or c["usage"] is None for c in chunks)
    assert not [line for line in lines if line and not line.startswith(("data: ", ":"))], "no named events"


@pytest.mark.parametrize("model", MODELS)
def test_usage_chunk_when_asked_for(gateway: Gateway, model: str) -> None:
    chunks, done, _ = read(gateway, body(model, "say one two", stream_options={"include_usage": True}))
    assert done
    for chunk in chunks:
        assert_chunk(chunk)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == 10
    assert chunks[-1]["usage"]["total_tokens"] == 12
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("finish", ["length", "content_filter"])
@pytest.mark.parametrize("streamed", [False, True])
def test_finish_reason_is_true(gateway: Gateway, model: str, finish: str, streamed: bool) -> None:
    request = body(model, f"[finish={finish}] say cut off", stream=streamed)
    if streamed:
        chunks, done, _ = read(gateway, request)
        assert done
        assert chunks[-1]["choices"][0]["finish_reason"] == finish
    else:
        answer = gateway.post("/v1/chat/completions", request)
        assert_completion(answer.json())
        assert answer.json()["choices"][0]["finish_reason"] == finish


@pytest.mark.parametrize("model", MODELS)
def test_whole_answer_validates(gateway: Gateway, model: str) -> None:
    answer = gateway.post("/v1/chat/completions", body(model, "say whole", stream=False))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert_completion(answer.json())
    assert answer.json()["model"] == model


@pytest.mark.parametrize("model", MODELS)
def test_first_event_is_delivered_while_the_upstream_still_writes(
    gateway: Gateway, upstream: ObedientUpstream, model: str
) -> None:
    with gateway.stream(
        "POST", "/v1/chat/completions", json_body=body(model, f"[hold=2] say early late {model}")
    ) as stream:
        chunks = stream.chunks()
        seen = ""
        while not seen:
            seen = text_of([next(chunks)])
        assert seen.strip() == "early"
        upstream.find(f"early late {model}")[-1].release()
        rest = list(chunks)
    assert text_of(rest).strip().startswith("late")


@pytest.fixture(scope="module")
def pinging(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    """A gateway that does not bear a tenth of a second of silence."""
    home = tmp_path_factory.mktemp("pinging")
    furnish(home, upstream.url)
    drop("WeatherAgent", home / "agents")
    write_agent(home / "agents", "Hasty", "You are hasty.", extra='__gateway__ = {"upstream": "hasty"}\n')
    with running_gateway(home, env={"GATEWAY_STREAM_PING_S": "0.1"}, key=ADMIN) as server:
        yield server


@pytest.mark.parametrize("model", MODELS)
def test_silence_is_filled_with_comments(pinging: Gateway, upstream: ObedientUpstream, model: str) -> None:
    text = f"[hold=0] say after silence {model}"
    with pinging.stream("POST", "/v1/chat/completions", json_body=body(model, text)) as stream:
        lines = stream.lines()
        assert next(line for line in lines if line).startswith(":"), "a comment, before the first token"
        assert next(line for line in lines if line).startswith(":"), "and another"
        upstream.find(f"after silence {model}")[-1].release()
        rest = list(lines)
    data = [line for line in rest if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    assert text_of([json.loads(d.removeprefix("data: ")) for d in data[:-1]]) == f"after silence {model}"


@pytest.mark.parametrize("model", ["default/hasty", "hasty/hasty-model"])
def test_failure_after_the_first_comment_is_an_error_in_the_stream(pinging: Gateway, model: str) -> None:
    with pinging.stream("POST", "/v1/chat/completions", json_body=body(model, "[fault=hang] say x")) as stream:
        assert stream.status == 200
        lines = list(stream.lines())
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert_error(data[-1])
    assert data[-1]["error"]["code"] == "upstream_timeout"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", ["cut", "reset", "errorobject", "notjson", "badutf8event", "nofinish"])
def test_a_broken_stream_ends_with_an_error_object_and_no_done(gateway: Gateway, model: str, fault: str) -> None:
    chunks, done, _ = read(gateway, body(model, f"[fault={fault} at=3] say one two three four"))
    assert not done
    assert_error(chunks[-1])
    for chunk in chunks[:-1]:
        assert_chunk(chunk)
    assert text_of(chunks[:-1]).startswith("one two")
    assert "canary" not in json.dumps(chunks) or fault == "errorobject"


@pytest.mark.parametrize("model", MODELS)
def test_failure_before_the_first_token_is_json_with_its_status(gateway: Gateway, model: str) -> None:
    answer = gateway.post("/v1/chat/completions", body(model, "[status=503] say down"))
    assert answer.status == 503
    assert answer.headers["content-type"] == "application/json"
    assert_error(answer.json())


def test_an_upstreams_own_top_level_keys_never_reach_a_client(gateway: Gateway) -> None:
    with gateway.stream(
        "POST", "/v1/chat/completions", json_body=body("local/test-model", "[fault=foreignkeys at=2] say a b c")
    ) as stream:
        raw = stream.raw.read().decode()
    assert "canary" not in raw
    assert "[DONE]" in raw


def test_missing_done_after_a_finish_reason_is_a_finished_answer(gateway: Gateway) -> None:
    for model in MODELS:
        chunks, done, _ = read(gateway, body(model, "[fault=nodone] say all said"))
        assert done and text_of(chunks) == "all said"


@pytest.mark.parametrize("model", MODELS)
def test_pace_of_the_tokens_is_kept(gateway: Gateway, model: str) -> None:
    def lasts() -> float:
        request = body(model, "[delay=0.05] say a b c d e f g h")
        with gateway.stream("POST", "/v1/chat/completions", json_body=request) as stream:
            seen = [
                time.monotonic()
                for chunk in stream.chunks()
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content")
            ]
        assert len(seen) == 8
        return seen[-1] - seen[0]

    # This reader may be late itself; where the gateway collects them, they come in one heap each time.
    assert any(lasts() > 0.2 for _ in range(5)), "tokens arrived in one heap"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_character_survives(gateway: Gateway, model: str, streamed: bool) -> None:
    odd = 'naïve "quotes" \\back\\slash\u2028line \u0085next 👩‍👩‍👧 emoji \ttab \x7f 日本語'
    request = body(model, f"say {odd}", stream=streamed)
    if streamed:
        chunks, done, _ = read(gateway, request)
        assert done and text_of(chunks) == odd
    else:
        answer = gateway.post("/v1/chat/completions", request)
        assert answer.json()["choices"][0]["message"]["content"] == odd


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_long_answer_is_whole(gateway: Gateway, model: str, streamed: bool) -> None:
    text = " ".join(f"{'w' * 200}{index}" for index in range(2000))
    request = body(model, f"say {text}", stream=streamed)
    if streamed:
        chunks, done, _ = read(gateway, request)
        assert done and text_of(chunks) == text
    else:
        assert gateway.post("/v1/chat/completions", request).json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("model", MODELS)
def test_visible_reasoning_is_passed_on(gateway: Gateway, model: str) -> None:
    chunks, _, _ = read(gateway, body(model, "[think=pondering] say so"))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "pondering" in [d.get("reasoning_content") for d in deltas]
    assert text_of(chunks) == "so"
    answer = gateway.post("/v1/chat/completions", body(model, "[think=pondering] say so", stream=False))
    assert answer.json()["choices"][0]["message"]["reasoning_content"] == "pondering"


@pytest.mark.parametrize("model", MODELS)
def test_a_refusal_is_a_refusal(gateway: Gateway, model: str) -> None:
    chunks, done, _ = read(gateway, body(model, "[refusal=no] say x"))
    assert done
    assert "".join(c["choices"][0]["delta"].get("refusal") or "" for c in chunks) == "no"
    assert text_of(chunks) == ""
    answer = gateway.post("/v1/chat/completions", body(model, "[refusal=no] say x", stream=False))
    assert_completion(answer.json())
    message = answer.json()["choices"][0]["message"]
    assert (message["refusal"], message["content"]) == ("no", None)


@pytest.mark.parametrize("model", MODELS)
def test_an_empty_answer_is_an_answer(gateway: Gateway, model: str) -> None:
    chunks, done, _ = read(gateway, body(model, "say"))
    assert done and text_of(chunks) == ""
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    answer = gateway.post("/v1/chat/completions", body(model, "say", stream=False))
    assert answer.status == 200
    assert not answer.json()["choices"][0]["message"]["content"]


def test_usage_of_a_streamed_run_with_a_tool_is_the_sum(gateway: Gateway) -> None:
    text = 'call get_weather {"city":"Sum"} ;; echo'
    chunks, done, _ = read(gateway, body(MODELS[0], text, stream_options={"include_usage": True}))
    assert done
    assert chunks[-1]["usage"]["prompt_tokens"] == 20


def test_one_connection_serves_a_stream_an_error_and_an_answer(gateway: Gateway) -> None:
    with closing(HTTPConnection("127.0.0.1", gateway.port, timeout=60)) as connection:
        for request, status in (
            (body(MODELS[0], "say one"), 200),
            (body(MODELS[0], "say one", temperature="hot"), 400),
            (body("default/nobody", "say one"), 404),
            (body(MODELS[1], "[status=500] say x"), 502),
            (body(MODELS[1], "say two"), 200),
            (body(MODELS[0], "say three", stream=False), 200),
        ):
            headers = {"authorization": f"Bearer {CHAT}", "content-type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
            first = connection.sock
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
            assert connection.sock is first, "the connection was closed"
