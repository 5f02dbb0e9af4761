"""Whatever a client sends, the answer is OpenAI-shaped, has a real status, and says nothing of the inside."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT
from tests.support.schema import assert_error
from tests.support.server import Gateway
from tests.support.waiting import in_time

MODEL = "default/weatheragent"
MESSAGES = [{"role": "user", "content": "say fine"}]
GOOD = json.dumps({"model": MODEL, "messages": MESSAGES})


def whole(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": MESSAGES} | fields).encode()


BODIES: dict[str, bytes] = {
    "empty": b"",
    "not json": b"model=default/weatheragent",
    "cut json": GOOD[:-5].encode(),
    "two objects": (GOOD + GOOD).encode(),
    "array": b"[]",
    "string": b'"hello"',
    "null": b"null",
    "NaN": GOOD.replace('"model"', '"temperature": NaN, "model"').encode(),
    "Infinity": GOOD.replace('"model"', '"temperature": Infinity, "model"').encode(),
    "1e999": GOOD.replace('"model"', '"temperature": 1e999, "model"').encode(),
    "1e999 as the user": GOOD.replace('"model"', '"user": 1e999, "model"').encode(),
    "1e999 in a field nobody knows": GOOD.replace('"model"', '"top_k": 1e999, "model"').encode(),
    "bad utf-8": b'{"model": "default/weatheragent", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "lone surrogate": b'{"model": "default/weatheragent\\ud800", "messages": [{"role": "user", "content": "hi"}]}',
    "deep array": b'{"model": "default/weatheragent", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"model": "default/weatheragent", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "duplicate key": b'{"model": "default/weatheragent", "model": "default/handoff", "messages": []}',
    "escaped duplicate key": GOOD.replace('"messages"', '"mod\\u0065l": "default/handoff", "messages"').encode(),
    "utf-16": GOOD.encode("utf-16"),
    "no messages": b'{"model": "default/weatheragent"}',
    "empty messages": whole(messages=[]),
    "messages an object": whole(messages={"role": "user", "content": "hi"}),
    "unknown role": whole(messages=[{"role": "wizard", "content": "hi"}]),
    "role a number": whole(messages=[{"role": 7, "content": "hi"}]),
    "content a number": whole(messages=[{"role": "user", "content": 7}]),
    "image from a file": whole(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    ),
    "unknown part": whole(messages=[{"role": "user", "content": [{"type": "smell", "smell": "rose"}]}]),
    "stream a word": whole(stream="yes"),
    "temperature a word": whole(temperature="hot"),
    "temperature too high": whole(temperature=9),
    "max_tokens negative": whole(max_tokens=-1),
    "max_tokens a fraction": whole(max_tokens=1.5),
    "n two": whole(n=2),
    "tools an object": whole(tools={"type": "function"}),
    "tool without function": whole(tools=[{"type": "function"}]),
    "tool name with spaces": whole(tools=[{"type": "function", "function": {"name": "a b"}}]),
    "tool_choice unknown tool": whole(tool_choice={"type": "function", "function": {"name": "nothing"}}),
    "response_format unknown": whole(response_format={"type": "yaml"}),
    "logprobs": whole(logprobs=True),
    "stream_options without stream": whole(stream_options={"include_usage": True}),
    "model a number": b'{"model": 7, "messages": [{"role": "user", "content": "hi"}]}',
    "model missing": b'{"messages": [{"role": "user", "content": "hi"}]}',
    "model null": b'{"model": null, "messages": [{"role": "user", "content": "hi"}]}',
    "tool message without a call": whole(messages=[{"role": "tool", "content": "x"}]),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", BODIES)
def test_bad_body_is_a_400_that_says_what_is_wrong(gateway: Gateway, case: str, streamed: bool) -> None:
    body = BODIES[case]
    if streamed and case != "stream_options without stream":
        body = body.replace(b'{"m', b'{"stream": true, "m', 1)
    answer = gateway.request("POST", "/v1/chat/completions", body=body, key=CHAT)
    assert answer.status == 400, answer.body[:500]
    assert_error(answer.json())
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 2000
    assert_nothing_leaks(gateway, answer.body)


NAMED = {
    "model missing": "model",
    "temperature a word": "temperature",
    "temperature too high": "temperature",
    "stream a word": "stream",
    "max_tokens negative": "max_tokens",
    "n two": "n",
    "logprobs": "logprobs",
    "no messages": "messages",
    "empty messages": "messages",
}


@pytest.mark.parametrize("case", NAMED)
def test_the_field_at_fault_is_named(gateway: Gateway, case: str) -> None:
    answer = gateway.request("POST", "/v1/chat/completions", body=BODIES[case], key=CHAT)
    assert answer.error["param"] == NAMED[case]
    assert NAMED[case] in answer.error["message"]


@pytest.mark.parametrize(
    "case", ["deep array", "deep object", "duplicate key", "bad utf-8", "NaN", "1e999 as the user"]
)
def test_a_raw_models_body_is_judged_by_the_same_rules(gateway: Gateway, case: str) -> None:
    body = BODIES[case].replace(b"default/weatheragent", b"local/test-model")
    answer = gateway.request("POST", "/v1/chat/completions", body=body, key=CHAT)
    assert answer.status == 400, answer.body[:500]
    assert_error(answer.json())


def test_a_hostile_body_does_not_block_other_requests(gateway: Gateway) -> None:
    many = b'{"model": "default/weatheragent", ' + b",".join(b'"k%d": 1' % i for i in range(60_000)) + b"}"

    def others_wait() -> float:
        with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
            sock.sendall(head(len(many)) + many)
            started = time.monotonic()
            assert gateway.get("/health").status == 200
            return time.monotonic() - started

    in_time(others_wait, 1.0)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/agents", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/responsesss", 404, "not_found"),
        ("GET", "/v1/models/default/nobody", 404, "model_not_found"),
        ("GET", "/agents/nothing/here", 404, "not_found"),
    ],
)
def test_wrong_method_and_unknown_path(gateway: Gateway, method: str, path: str, status: int, code: str) -> None:
    answer = gateway.request(method, path)
    assert (answer.status, answer.error["code"]) == (status, code), answer.body
    assert_error(answer.json())
    if status == 405:
        assert answer.headers["allow"]
    assert_nothing_leaks(gateway, answer.body)


def head(length: int, *, key: str | None = CHAT, path: str = "/v1/chat/completions") -> bytes:
    auth = f"authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{auth}content-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def read_answer(sock: socket.socket) -> tuple[int, dict[str, Any]]:
    seen = b""
    while b"\r\n\r\n" not in seen:
        data = sock.recv(65536)
        assert data, f"closed without an answer: {seen!r}"
        seen += data
    top, _, body = seen.partition(b"\r\n\r\n")
    length = int(next(line for line in top.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1])
    while len(body) < length:
        data = sock.recv(65536)
        assert data
        body += data
    return int(top.split(b" ")[1]), json.loads(body)


def test_a_body_over_the_limit_is_413_before_it_is_read(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
        sock.sendall(head(50_000_000))
        status, body = read_answer(sock)
    assert status == 413, "a declared length over the limit is refused before the body is sent"
    assert_error(body)
    assert body["error"]["code"] == "request_too_large"


def test_a_chunked_body_over_the_limit_is_413_while_it_is_read(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
        top = head(0).replace(b"content-length: 0", b"transfer-encoding: chunked")
        sock.sendall(top)
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 200_000_000:
                sock.sendall(chunk)
                sent += len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 200_000_000, "the server went on reading"
    answer = gateway.get("/health")
    assert answer.status == 200


ADMIN_BODIES = {
    "a list": (b"[1]", 400, "must be one JSON object"),
    "cut": (b'{"agent":', 400, "not valid JSON"),
    "a key twice": (b'{"agent": "%s", "agent": "x"}' % MODEL.encode(), 400, "more than once"),
    "no body": (b"", 400, "needs a body"),
}


@pytest.mark.parametrize("case", ADMIN_BODIES)
def test_bodies_of_admin_routes_are_judged_by_the_same_rules(gateway: Gateway, case: str) -> None:
    body, status, says = ADMIN_BODIES[case]
    answer = gateway.request("POST", "/security/preview", body=body, key=ADMIN)
    assert answer.status == status, answer.body
    assert_error(answer.json())
    assert says in answer.error["message"]


def test_an_admin_body_over_the_limit_is_413_before_it_is_read(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
        sock.sendall(head(50_000_000, key=ADMIN, path="/security/preview"))
        status, body = read_answer(sock)
    assert (status, body["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json", None])
def test_an_admin_body_is_json_whatever_the_client_calls_it(gateway: Gateway, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    body = json.dumps({"agent": MODEL}).encode()
    answer = gateway.request("POST", "/security/preview", body=body, key=ADMIN, headers=headers)
    assert (answer.status, answer.json().get("agent")) == (200, MODEL), answer.body


def test_the_key_is_checked_before_the_body_is_read(gateway: Gateway) -> None:
    for key in (None, "sk-wrong-0123456789abcdef"):
        with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
            sock.sendall(head(900_000, key=key) + b'{"model":')
            status, body = read_answer(sock)
        assert status == 401, "no body is needed to see that the key is wrong"
        assert_error(body)


def test_a_huge_but_allowed_body_is_served(gateway: Gateway) -> None:
    text = "say fine\n" + "x" * 800_000
    answer = gateway.post("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": text}]})
    assert answer.status == 200, answer.body[:300]


def test_unknown_model_with_a_bad_stream_is_refused_before_any_byte_of_a_stream(gateway: Gateway) -> None:
    answer = gateway.post("/v1/chat/completions", {"model": "default/nobody", "messages": MESSAGES, "stream": True})
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "model",
    [
        "../weatheragent",
        "default/../default/weatheragent",
        "default//weatheragent",
        "default/weatheragent/",
        "/default/weatheragent",
        "default\\weatheragent",
        "default/weatheragent\u0000",
        "default/weatheragent ",
        "ｄefault/weatheragent",
        "default/weatherag\u0435nt",
        "default%2Fweatheragent",
        "*",
        "default/*",
        "",
        "a" * 5000,
        "file:///etc/passwd",
        "http://127.0.0.1/x",
    ],
)
def test_odd_spellings_of_a_model_are_unknown(gateway: Gateway, model: str) -> None:
    answer = gateway.post("/v1/chat/completions", {"model": model, "messages": MESSAGES})
    assert answer.status in (400, 404), answer.body
    assert_error(answer.json())
    assert len(answer.body) < 2000


def test_raw_bytes_that_are_no_http_do_no_harm(gateway: Gateway) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x00" * 1000):
        with socket.create_connection(("127.0.0.1", gateway.port), 60) as sock:
            sock.sendall(junk)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(65536)
            assert b"Traceback" not in answer
    assert gateway.get("/health").status == 200


def assert_nothing_leaks(gateway: Gateway, body: bytes) -> None:
    text = body.decode()
    for secret in (CHAT, "canary", "Traceback", "site-packages", ".py", str(gateway.home), "msgspec", "pydantic"):
        assert secret not in text, f"{secret!r} leaks: {text}"


def test_a_compressed_body_is_refused_by_name(gateway: Gateway) -> None:
    answer = gateway.request("POST", "/v1/chat/completions", body=whole(), headers={"content-encoding": "gzip"})
    assert answer.status == 400
    assert_error(answer.json())
    assert "content-encoding: gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/docs", "/openapi.json", "/agents"])
def test_head_is_answered_wherever_get_is(gateway: Gateway, path: str) -> None:
    answer = gateway.request("HEAD", path)
    assert (answer.status, answer.body) == (200, b"")
