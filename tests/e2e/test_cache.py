"""The response cache by a real gateway: who gets whose answer, what is never kept, calls that are shared, Redis."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support.house import ADMIN, CHAT, NARROW, SECURITY, WEBUI
from tests.support.scripted_answers import Answer, Call, status
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import in_time, wait_for

REDIS_URL = os.environ.get("GATEWAY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")

UPSTREAMS = """\
version: 1
upstreams:
  - {{name: up, base_url: {url}, models: [kept, "*"], discover: false, default_model: plain}}
  - {{name: spare, base_url: {url}, models: [m], priority: 2}}
"""
ROUTING = """\
version: 1
models:
  up/fallen: {fallbacks: [spare/m]}
breaker: {failures: 1000, open_s: 1}
health_interval_s: 3600
"""
CACHE = """\
version: 1
models:
  - {match: up/shared, sharing: everyone}
  - {match: up/short, ttl_s: 0.2}
  - {match: up/small, max_body_bytes: 1024}
  - {match: up/streams, streams: true}
  - {match: up/tools, tools: true, streams: true}
  - {match: up/uncached-not, ttl_s: 60}
  - {match: up/fallen}
  - {match: up/kept*}
  - {match: up/embed}
"""
PRICES = "version: 1\nmodels: [{match: up/*, input: 1, output: 1}]\n"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class House:
    def __init__(self, gateway: Gateway, upstream: ScriptedUpstream) -> None:
        self.gateway, self.upstream = gateway, upstream

    def ask(self, model: str, text: str, *, headers: Any = None, key: str | None = None, **fields: Any) -> Any:
        body = {"model": f"up/{model}", "messages": [{"role": "user", "content": text}], **fields}
        return self.gateway.post("/v1/chat/completions", body, headers=headers, key=key)

    def asked(self, text: str) -> int:
        """How often the upstream was asked this."""
        return sum(text in r.body.decode() for r in self.upstream.requests)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("cache")
    with ScriptedUpstream() as upstream, running_gateway(home, env=furnish(home, upstream), key=ADMIN) as gateway:
        yield House(gateway, upstream)


def furnish(home: Path, upstream: ScriptedUpstream, cache: str = CACHE) -> dict[str, str]:
    for name, text in {
        "upstreams": UPSTREAMS.format(url=upstream.base_url),
        "routing": ROUTING,
        "security": SECURITY.replace("HIDE", "false"),
        "prices": PRICES,
        "cache": cache,
    }.items():
        (home / f"{name}.yaml").write_text(text, encoding="utf-8")
    return {
        "GATEWAY_PRICES_CONFIG": str(home / "prices.yaml"),
        "GATEWAY_CACHE_CONFIG": str(home / "cache.yaml"),
        "GATEWAY_UPSTREAM_AUTO_RELOAD": "1",
    }


def test_the_second_answer_comes_from_the_cache_and_costs_nothing(house: House) -> None:
    first, second = house.ask("kept", "twice"), house.ask("kept", "twice", metadata={"job": "2"})
    assert [answer.headers["x-cache"] for answer in (first, second)] == ["miss", "hit"]
    assert house.asked("twice") == 1
    one, two = first.json(), second.json()
    assert one.pop("id") == "chatcmpl-scripted"
    assert two.pop("id").startswith("chatcmpl-") and one == two
    assert "age" not in first.headers and 0 <= int(second.headers["age"]) < 30
    assert first.headers["x-gateway-cost-usd"] == "0.000018"
    assert second.headers["x-gateway-cost-usd"] == "0"
    assert "x-gateway-upstream" in first.headers and "x-gateway-upstream" not in second.headers

    house.gateway.logged("run.finished", cached=True, model="up/kept", cost_usd=0, outcome="success")
    text = house.gateway.get("/metrics/prometheus").body.decode()
    for result in ("hit", "miss"):
        assert f'agent_gateway_cache_requests_total{{model="up/kept",result="{result}"}} ' in text
    assert float(text.split("\nagent_gateway_cache_bytes ")[1].split()[0]) > 0


def test_a_model_without_a_row_has_no_cache(house: House) -> None:
    for _ in range(2):
        assert "x-cache" not in house.ask("plain", "never kept").headers
    assert house.asked("never kept") == 2


def test_answers_are_a_keys_own_unless_they_are_everyones(house: House) -> None:
    keys = (ADMIN, CHAT, WEBUI)
    assert [house.ask("kept", "mine", key=key).headers["x-cache"] for key in keys] == ["miss"] * 3
    assert [house.ask("shared", "ours", key=key).headers["x-cache"] for key in keys] == ["miss", "hit", "hit"]
    refused = house.ask("shared", "ours", key=NARROW)
    assert refused.status == 403 and b"ours" not in refused.body


@pytest.mark.parametrize(
    ("model", "fields", "headers"),
    [
        ("kept", {"stream": True}, {}),
        ("kept", {"tools": [TOOL], "tool_choice": "none"}, {}),
        ("kept", {"store": True}, {}),
        ("kept", {}, {"cache-control": "no-store"}),
        ("streams", {"stream": True, "tools": [TOOL], "tool_choice": "none"}, {}),
    ],
)
def test_what_is_not_asked_to_be_kept_passes_by_the_cache(
    house: House, model: str, fields: dict[str, Any], headers: dict[str, str]
) -> None:
    text = f"bypass {secrets.token_hex(4)}"
    for _ in range(2):
        answer = house.ask(model, text, headers=headers, **fields)
        assert (answer.status, answer.headers["x-cache"]) == (200, "bypass")
    assert house.asked(text) == 2
    assert house.ask(model, text).headers["x-cache"] == "miss"


def test_a_caller_may_ask_for_a_fresh_answer_which_is_kept(house: House) -> None:
    house.upstream.enqueue(Answer(text="old"), Answer(text="new"))
    fresh = {"cache-control": "no-cache"}
    answers = [house.ask("kept", "refresh", headers=headers) for headers in ({}, {}, fresh, {})]
    assert [a.headers["x-cache"] for a in answers] == ["miss", "hit", "miss", "hit"]
    texts = [a.json()["choices"][0]["message"]["content"] for a in answers]
    assert texts == ["old", "old", "new", "new"]


@pytest.mark.parametrize(
    ("name", "answer", "code"),
    [
        ("error", status(500), 502),
        ("limit", status(429), 429),
        ("refused", status(400), 400),
        ("filtered", Answer(text="x", finish_reason="content_filter"), 200),
        ("calls", Answer(calls=[Call("f")]), 200),
        ("cut", fault("no_finish_reason"), 502),
        ("html", fault("html"), 502),
    ],
)
def test_only_finished_answers_are_kept(house: House, name: str, answer: Answer, code: int) -> None:
    house.upstream.enqueue(answer)
    first = house.ask("kept", f"bad end: {name}")
    assert first.status == code
    second = house.ask("kept", f"bad end: {name}")
    assert (second.status, second.headers["x-cache"]) == (200, "miss")
    assert house.ask("kept", f"bad end: {name}").headers["x-cache"] == "hit"


def test_a_choice_that_was_filtered_keeps_the_whole_answer_out(house: House) -> None:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": "x"}, "finish_reason": reason}
        for i, reason in enumerate(("stop", "content_filter"))
    ]
    house.upstream.enqueue(Answer(body={"id": "c", "object": "chat.completion", "choices": choices}))
    assert [house.ask("kept", "two choices", n=2).headers["x-cache"] for _ in range(2)] == ["miss", "miss"]


def test_a_stand_ins_answer_is_not_kept_as_the_models(house: House) -> None:
    house.upstream.enqueue(status(500))
    first = house.ask("fallen", "stand in")
    assert (first.headers["x-gateway-upstream"], first.headers["x-cache"]) == ("spare", "miss")
    second = house.ask("fallen", "stand in")
    assert (second.headers["x-gateway-upstream"], second.headers["x-cache"]) == ("up", "miss")


def test_an_answer_is_kept_for_its_time_and_up_to_its_size(house: House) -> None:
    assert house.ask("short", "soon gone").headers["x-cache"] == "miss"
    wait_for(lambda: house.ask("short", "soon gone").headers["x-cache"] == "miss", every_s=0.25)
    house.upstream.enqueue(Answer(text="x" * 2000), Answer(text="x" * 2000))
    assert [house.ask("small", "long").headers["x-cache"] for _ in range(2)] == ["miss", "miss"]
    assert [house.ask("small", "brief").headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    answer = house.ask("kept", "too old for me")
    assert house.ask("kept", "too old for me", headers={"cache-control": "max-age=0"}).headers["x-cache"] == "miss"
    assert answer.status == 200


def test_embeddings_are_kept(house: House) -> None:
    with OpenAI(base_url=house.gateway.url + "/v1", api_key=CHAT, max_retries=0) as client:
        raw = [client.embeddings.with_raw_response.create(model="up/embed", input="vector me") for _ in range(2)]
    assert [answer.headers["x-cache"] for answer in raw] == ["miss", "hit"]
    assert raw[0].parse() == raw[1].parse()
    assert house.asked("vector me") == 1


@pytest.mark.parametrize("usage", [True, False])
def test_a_kept_stream_is_given_again_chunk_by_chunk_under_one_new_id(house: House, usage: bool) -> None:
    ids, texts, numbers = [], [], []
    with OpenAI(base_url=house.gateway.url + "/v1", api_key=CHAT, max_retries=0) as client:
        for expected in ("miss", "hit"):
            raw = client.chat.completions.with_raw_response.create(
                model="up/streams",
                messages=[{"role": "user", "content": f"stream {usage}"}],
                stream=True,
                stream_options={"include_usage": usage},
            )
            assert raw.headers["x-cache"] == expected
            chunks = list(raw.parse())
            ids.append({chunk.id for chunk in chunks})
            texts.append("".join(c.delta.content or "" for chunk in chunks for c in chunk.choices))
            numbers.append([chunk.usage.total_tokens for chunk in chunks if chunk.usage])
            assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "stop"
    assert ids[0] == {"chatcmpl-scripted"} and len(ids[1]) == 1 and ids[0] != ids[1]
    assert texts == [f"You said: stream {usage}"] * 2
    assert numbers == ([[18], [18]] if usage else [[], []])
    assert house.asked(f"stream {usage}") == 1
    # The same question without a stream is another answer, and a cut stream is none.
    assert house.ask("streams", f"stream {usage}").headers["x-cache"] == "miss"
    house.upstream.enqueue(fault("cut_between_events"))
    assert b'"error"' in house.ask("streams", f"cut {usage}", stream=True).body
    assert house.ask("streams", f"cut {usage}", stream=True).headers["x-cache"] == "miss"


def test_tools_are_kept_where_they_are_asked_for(house: House) -> None:
    for streamed in (False, True):
        answers = [house.ask("tools", f"tools {streamed}", stream=streamed, tools=[TOOL]) for _ in range(2)]
        assert [a.headers["x-cache"] for a in answers] == ["miss", "hit"]
        assert b"tool_calls" in answers[1].body


# Calls that are shared


@pytest.mark.parametrize("streamed", [False, True])
def test_the_same_question_at_the_same_time_is_asked_once(house: House, streamed: bool) -> None:
    text = f"together {streamed}"
    house.upstream.enqueue(Answer(text="one answer", first_delay_s=0.5))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: house.ask("streams", text, stream=streamed), range(8)))
    assert house.asked(text) == 1
    assert sorted(a.headers["x-cache"] for a in answers) == ["hit"] * 7 + ["miss"]
    assert all(a.status == 200 and b"answer" in a.body for a in answers)
    ids = {a.headers["x-request-id"] for a in answers}
    runs = house.gateway.logged("run.finished", count=8, where=lambda line: line["request_id"] in ids)
    assert sorted(bool(run.get("cached")) for run in runs) == [False] + [True] * 7


def test_who_comes_late_to_a_stream_reads_it_from_its_beginning(house: House) -> None:
    gate = house.upstream.gate()
    house.upstream.enqueue(Answer(text="first second third", gate=gate))
    body = {"model": "up/streams", "stream": True, "messages": [{"role": "user", "content": "come late"}]}
    with (
        house.gateway.stream("POST", "/v1/chat/completions", json_body=body) as one,
        house.gateway.stream("POST", "/v1/chat/completions", json_body=body) as two,
    ):
        chunks = one.chunks(), two.chunks()
        begun = [[next(stream), next(stream)] for stream in chunks]
        assert [part[1]["choices"][0]["delta"]["content"] for part in begun] == ["first", "first"]
        gate.open()
        rest = [list(stream) for stream in chunks]
    assert [len(part) for part in rest] == [3, 3]
    assert house.asked("come late") == 1


def test_the_answer_goes_on_without_the_first_who_asked_and_ends_with_the_last(house: House) -> None:
    gate = house.upstream.gate()
    house.upstream.enqueue(Answer(text="first second third", gate=gate))
    body = {"model": "up/streams", "stream": True, "messages": [{"role": "user", "content": "leave early"}]}
    leader = ExitStack()
    one = leader.enter_context(house.gateway.stream("POST", "/v1/chat/completions", json_body=body))
    next(one.chunks())
    with house.gateway.stream("POST", "/v1/chat/completions", json_body=body) as two:
        chunks = two.chunks()
        next(chunks)
        leader.close()
        house.gateway.logged("http.client.gone", model="up/streams")
        gate.open()
        assert "third" in json.dumps(list(chunks))
    assert house.asked("leave early") == 1
    assert house.ask("streams", "leave early", stream=True).headers["x-cache"] == "hit"

    house.upstream.enqueue(Answer(text="first second third", gate=house.upstream.gate()))
    body["messages"] = [{"role": "user", "content": "all leave"}]
    number = len(house.upstream.requests) + 1
    with house.gateway.stream("POST", "/v1/chat/completions", json_body=body) as one:
        next(one.chunks())
        with house.gateway.stream("POST", "/v1/chat/completions", json_body=body) as two:
            next(two.chunks())
        left = time.monotonic()
    assert house.upstream.wait_closed(number) - left < 20, "long before any deadline of the upstream"
    assert house.ask("streams", "all leave", stream=True).headers["x-cache"] == "miss"


def test_when_the_call_fails_another_takes_over_once(house: House) -> None:
    broken = Answer(status=500, body={"error": {"message": "no"}}, first_delay_s=0.4)
    house.upstream.enqueue(broken, Answer(text="second try", first_delay_s=0.2))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: house.ask("kept", "take over"), range(4)))
    assert sorted(a.status for a in answers) == [200, 200, 200, 502]
    assert house.asked("take over") == 2

    refused = Answer(status=400, body={"error": {"message": "Your fault."}}, first_delay_s=0.4)
    house.upstream.enqueue(refused)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: house.ask("kept", "own fault"), range(4)))
    assert [a.status for a in answers] == [400] * 4
    assert house.asked("own fault") == 1


# Files and Redis


def test_a_change_of_the_rules_holds_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    with ScriptedUpstream() as upstream:
        env = furnish(tmp_path, upstream, "version: 1\n")
        with running_gateway(tmp_path, env=env, key=ADMIN) as gateway:
            house = House(gateway, upstream)
            assert "x-cache" not in house.ask("kept", "reload").headers
            (tmp_path / "cache.yaml").write_text(CACHE, encoding="utf-8")
            wait_for(lambda: house.ask("kept", "reload").headers.get("x-cache") == "hit")
            (tmp_path / "cache.yaml").write_text("models: [{match: x, ttl: 1}]", encoding="utf-8")
            gateway.logged("config.reload.failed", file="cache.yaml", where=lambda line: "ttl_s" in line["message"])
            assert house.ask("kept", "reload").headers["x-cache"] == "hit"


def test_two_processes_share_answers_and_calls_over_redis(tmp_path: Path) -> None:
    _need_redis()
    rules = "models: [{match: 'up/*', backend: redis, streams: true, ttl_s: 60, wait_s: 10}]\nredis: {timeout_s: 5}"
    name = secrets.token_hex(8)
    with ScriptedUpstream() as upstream:
        env = furnish(tmp_path, upstream, rules) | {"GATEWAY_REDIS_URL": REDIS_URL}
        other = tmp_path / "other"
        other.mkdir()
        with (
            running_gateway(tmp_path, env=env, key=ADMIN) as one,
            running_gateway(other, env=env | _files_of(tmp_path), key=ADMIN) as two,
        ):
            houses = House(one, upstream), House(two, upstream)
            for streamed in (False, True):
                upstream.enqueue(Answer(text=f"shared {name}", first_delay_s=0.6))
                with ThreadPoolExecutor(6) as pool:
                    asking = [pool.submit(h.ask, "m", f"{name} {streamed}", stream=streamed) for h in houses * 3]
                    answers = [future.result() for future in asking]
                assert all(a.status == 200 and b"shared" in a.body for a in answers), answers
                assert houses[0].asked(f"{name} {streamed}") == 1
                for house in houses:
                    assert house.ask("m", f"{name} {streamed}", stream=streamed).headers["x-cache"] == "hit"


def test_without_redis_every_request_goes_to_its_upstream_without_delay(tmp_path: Path) -> None:
    with ScriptedUpstream() as upstream:
        rules = "models: [{match: 'up/*', backend: redis}]\nredis: {pause_s: 60}"
        env = furnish(tmp_path, upstream, rules) | {"GATEWAY_REDIS_URL": "redis://:canary-pw@127.0.0.1:9/0"}
        with running_gateway(tmp_path, env=env, key=ADMIN) as gateway:
            house = House(gateway, upstream)
            house.ask("m", "down")

            def ask_again() -> float:
                started = time.monotonic()
                answers = [house.ask("m", "down") for _ in range(20)]
                assert {(a.status, a.headers["x-cache"]) for a in answers} == {(200, "miss")}
                return time.monotonic() - started

            in_time(ask_again, 2)
            gateway.logged("cache.redis.failed")
            assert len(gateway.log_events("cache.redis.failed")) == 1
            assert (
                'agent_gateway_cache_errors_total{backend="redis"} 1'
                in gateway.get("/metrics/prometheus").body.decode()
            )
            assert "canary-pw" not in gateway.log_text()


def _files_of(home: Path) -> dict[str, str]:
    files = {"UPSTREAM": "upstreams", "SECURITY": "security", "ROUTING": "routing"}
    return {f"GATEWAY_{name}_CONFIG": str(home / f"{file}.yaml") for name, file in files.items()}


def _need_redis() -> None:
    host, _, port = REDIS_URL.partition("://")[2].partition("/")[0].rpartition("@")[2].partition(":")
    try:
        socket.create_connection((host, int(port or 6379)), 1).close()
    except OSError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("no Redis at GATEWAY_TEST_REDIS_URL")
