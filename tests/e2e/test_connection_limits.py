"""What one client can cost: heads and bodies that drip, crowds, ambiguous shapes, slow readers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.scripted_upstream import Answer, ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import in_time, wait_for

SERVE = ("-m", "gateway_cli", "serve", "--port")
KEY = "sk-test-limits-aaaaaaaaaaaaaaaaaaaaaaaa"
CHAT_PATH = "/v1/chat/completions"
HEAD_S = BODY_S = 0.6
KEEP_ALIVE_S = 3.0
"""Longer than a busy machine pauses between two requests on one connection."""
ENV = {
    "GATEWAY_API_KEY": KEY,
    "GATEWAY_REQUEST_HEAD_TIMEOUT_S": str(HEAD_S),
    "GATEWAY_REQUEST_HEAD_LIMIT_BYTES": "8000",
    "GATEWAY_REQUEST_HEADER_LIMIT": "40",
    "GATEWAY_REQUEST_BODY_TIMEOUT_S": str(BODY_S),
    "GATEWAY_REQUEST_BODY_LIMIT_BYTES": "100000",
    "GATEWAY_CLIENT_STALL_S": "0.6",
    "GATEWAY_KEEP_ALIVE_S": str(KEEP_ALIVE_S),
    "GATEWAY_SHUTDOWN_DRAIN_S": "1",
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("limits")
    write_upstream(home, upstream)
    with running_gateway(home, env=ENV, key=KEY, command=SERVE) as server:
        yield server


def write_upstream(home: Path, upstream: ScriptedUpstream) -> None:
    (home / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
    (home / "upstreams.yaml").write_text(
        "version: 1\nupstreams:\n"
        f"  - {{name: up, provider: openai-compatible, base_url: '{upstream.base_url}', models: ['*']}}\n",
        encoding="utf-8",
    )


def connect(gateway: Gateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def send(gateway: Gateway, data: bytes, event: str = "http.request.refused") -> tuple[int, dict[str, str]]:
    """Send bytes and return the status and the error object of the answer, which must close the connection.

    It has an id, under which the log has a line of ``event``.
    """
    with closing(connect(gateway)) as connection:
        connection.sendall(data)
        answer = read_all(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer
    (request_id,) = re.findall(rb"\r\nx-request-id: (\S+)", head)
    assert b"\r\nx-correlation-id: " + request_id in head
    gateway.logged(event, request_id=request_id.decode(), status=int(head.split()[1]))
    return int(head.split()[1]), json.loads(body)["error"]


def request(*lines: str, start: str = "GET /health HTTP/1.1", body: bytes = b"") -> bytes:
    return "\r\n".join([start, *lines, "", ""]).encode("latin-1") + body


HOST = "Host: localhost"

SHAPES = {
    "two hosts": request(HOST, "Host: evil"),
    "no host": request(),
    "a host that is none": request("Host: a b"),
    "length and chunks": request(
        HOST,
        "Content-Length: 4",
        "Transfer-Encoding: chunked",
        start="POST /v1/chat/completions HTTP/1.1",
        body=b"0\r\n\r\n",
    ),
    "two lengths": request(HOST, "Content-Length: 4", "Content-Length: 5", body=b"abcde"),
    "a signed length": request(HOST, "Content-Length: +4", body=b"abcd"),
    "a coding before chunked": request(HOST, "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "a coding that is not chunked": request(HOST, "Transfer-Encoding: identity"),
    "chunks in HTTP/1.0": request(HOST, "Transfer-Encoding: chunked", start="GET /health HTTP/1.0", body=b"0\r\n\r\n"),
    "space before the colon": request(HOST, "Content-Length : 4", body=b"abcd"),
    "a folded header": request(HOST, "X-A: b", " c"),
    "a bare line feed": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "a NUL in a header": request(HOST, "X-A: a\0b"),
    "another host in the target": request(HOST, start="GET http://evil/health HTTP/1.1"),
    "a tunnel": request(HOST, start="CONNECT evil:443 HTTP/1.1"),
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a chunk size that is none": request(
        HOST, "Transfer-Encoding: chunked", start="GET /nowhere HTTP/1.1", body=b"zz\r\n\r\n"
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_two_servers_could_read_differently_is_refused(gateway: Gateway, shape: str) -> None:
    status, error = send(gateway, SHAPES[shape])
    assert (status, error["code"], error["type"]) == (400, "malformed_request", "invalid_request_error")


def test_heads_that_are_too_large_are_refused(gateway: Gateway) -> None:
    for data in (
        request(HOST, "X-A: " + "a" * 9_000),
        request(HOST, start=f"GET /{'a' * 9_000} HTTP/1.1"),
        request(HOST, *(f"X-{number}: 1" for number in range(50))),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Endless: " + b"a" * 20_000,
    ):
        status, error = send(gateway, data)
        assert (status, error["code"]) == (431, "request_head_too_large")


def test_a_head_that_drips_is_cut(gateway: Gateway) -> None:
    started = time.monotonic()
    with closing(connect(gateway)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        connection.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - started < 60:
            connection.sendall(b"X: y\r\n")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        took = time.monotonic() - started
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert took >= HEAD_S * 0.8
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_silence_and_empty_lines_are_cut(gateway: Gateway) -> None:
    with closing(connect(gateway)) as silent, closing(connect(gateway)) as empty:
        for _ in range(3):
            empty.sendall(b"\r\n")
        assert read_all(silent) == b""
        assert read_all(empty) == b""


def test_a_connection_is_kept_and_closed_when_it_rests(gateway: Gateway) -> None:
    with closing(connect(gateway)) as connection:
        for _ in range(3):
            started = time.monotonic()
            connection.sendall(request(HOST))
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
        assert connection.recv(1) == b""
        assert time.monotonic() - started > KEEP_ALIVE_S * 0.8


def test_a_body_that_drips_is_cut(gateway: Gateway) -> None:
    head = request(
        HOST, f"Authorization: Bearer {KEY}", "Content-Length: 5000", start="POST /v1/chat/completions HTTP/1.1"
    )
    with closing(connect(gateway)) as connection:
        connection.sendall(head + b"{")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 "), answer


def test_an_upload_that_drips_is_cut(gateway: Gateway) -> None:
    """Each byte comes in time; all of them together do not."""
    head = request(
        HOST,
        f"Authorization: Bearer {KEY}",
        "Content-Type: multipart/form-data; boundary=b",
        "Content-Length: 5000",
        start="POST /v1/files HTTP/1.1",
    )
    started, answer = time.monotonic(), b""
    with closing(connect(gateway)) as connection:
        connection.sendall(head + b"--b\r\n")
        connection.settimeout(0.1)
        while not answer and time.monotonic() - started < 60:
            try:
                connection.sendall(b"x")
                answer = connection.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        assert time.monotonic() - started > BODY_S * 0.8
    assert b" 408 " in answer[:16], answer


@pytest.mark.parametrize("framing", ["Content-Length: 2", "Transfer-Encoding: chunked"])
def test_a_request_that_asks_for_another_protocol_keeps_its_body(gateway: Gateway, framing: str) -> None:
    """Java's client asks for HTTP/2 with every POST."""
    head = request(
        HOST,
        f"Authorization: Bearer {KEY}",
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
        framing,
        start="POST /v1/chat/completions HTTP/1.1",
    )
    body = b"[]" if framing.startswith("C") else b"1\r\n[\r\n1\r\n]\r\n0\r\n\r\n"
    last = request(HOST, "Connection: close")
    with closing(connect(gateway)) as connection:
        connection.sendall(head + body + head + body[:1])
        connection.sendall(body[1:] + last)
        answers = read_all(connection)
    assert answers.count(b"must be one JSON object") == 2, answers
    assert answers.count(b"HTTP/1.1 200 OK") == 1, answers


@pytest.mark.parametrize("flood", [b"0\r\nX-Endless: ", b"1;x="])
def test_what_wraps_a_body_has_a_limit(gateway: Gateway, flood: bytes) -> None:
    head = request(
        HOST, f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked", start="POST /v1/chat/completions HTTP/1.1"
    )
    sent = 0
    with closing(connect(gateway)) as connection:
        connection.sendall(head + flood)
        with contextlib.suppress(ConnectionError):
            while sent < 20_000_000:
                connection.sendall(b"a" * 16_384)
                sent += 16_384
    assert sent < 8_000_000, "cut long before that"
    assert gateway.get("/health", key="", timeout_s=5).status == 200


def test_small_chunks_of_a_large_body_are_none_of_that(gateway: Gateway) -> None:
    head = request(
        HOST, f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked", start="POST /v1/chat/completions HTTP/1.1"
    )
    with closing(connect(gateway)) as connection:
        connection.sendall(head + b"1\r\n \r\n" * 90_000 + b"2\r\n{}\r\n0\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")  # a chat without a model


def test_a_body_nobody_waits_for_any_more_is_not_waited_for(gateway: Gateway) -> None:
    """The answer (401) is quicker than the body; the rest of the body has as long as a head."""
    with closing(connect(gateway)) as connection:
        connection.sendall(request(HOST, "Content-Length: 5000", start="POST /nowhere HTTP/1.1"))
        assert b" 401 " in read_all(connection)


def test_a_client_that_does_not_read_is_cut_and_its_upstream_call_ends(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    upstream.enqueue(Answer(text=("w" * 8_000 + " ") * 2_000))
    body = json.dumps({"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    head = request(
        HOST,
        f"Authorization: Bearer {KEY}",
        f"Content-Length: {len(body)}",
        start="POST /v1/chat/completions HTTP/1.1",
    )
    before = len(upstream.requests)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gateway.port))
        connection.sendall(head + body)
        wait_for(lambda: len(upstream.requests) > before, what="the upstream is asked")
        asked = upstream.requests[-1]
        assert asked.closed.wait(60), "the upstream call goes on for a client that does not read"
    gateway.logged("http.client.stalled")


def test_a_thousand_idle_connections_hold_nobody_up(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    write_upstream(tmp_path, upstream)
    env = ENV | {"GATEWAY_REQUEST_HEAD_TIMEOUT_S": "30", "GATEWAY_MAX_CONNECTIONS": "900"}
    with running_gateway(tmp_path, env=env, key=KEY, command=SERVE) as gateway, ExitStack() as stack:
        before = gateway.rss_mb()
        for _ in range(900):
            stack.enter_context(closing(connect(gateway)))
        wait_for(lambda: gateway.get("/v1/models").status == 503, what="the limit is reached")
        refused = gateway.get("/v1/models")
        assert (refused.error["code"], refused.headers["retry-after"]) == ("overloaded", "1")
        gateway.logged("http.request.refused", request_id=refused.headers["x-request-id"])
        assert gateway.get("/health", key="").status == 200
        assert gateway.get("/metrics").status == 200
        assert gateway.rss_mb() - before < 30
        stack.close()
        wait_for(lambda: gateway.get("/v1/models").status == 200, what="others are served again")


def test_runs_at_a_time_have_a_limit(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    write_upstream(tmp_path, upstream)
    with running_gateway(tmp_path, env=ENV | {"GATEWAY_MAX_RUNS": "1"}, key=KEY, command=SERVE) as gateway:
        body = {"model": "up/fault:hang_part_way", "stream": True, "messages": [{"role": "user", "content": "x"}]}
        with gateway.stream("POST", "/v1/chat/completions", json_body=body) as live:
            assert live.status == 200
            assert next(live.lines())
            refused = gateway.post("/v1/chat/completions", body)
            assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "overloaded", "1")
            assert gateway.get("/health", key="").status == 200
        wait_for(
            lambda: gateway.post("/v1/chat/completions", {**body, "model": "up/m", "stream": False}).status == 200,
            what="there is room again",
        )


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(("key", "status"), [(KEY, 413), ("sk-wrong", 401)])
@pytest.mark.parametrize("times", [2, 10, 100])
def test_a_client_that_sends_on_reads_why_it_was_refused(
    gateway: Gateway, framing: str, key: str, status: int, times: int
) -> None:
    """It writes all it has before it reads anything, as some do: a reset on the way would hide the answer."""
    size = int(ENV["GATEWAY_REQUEST_BODY_LIMIT_BYTES"]) * times
    wrap = f"Content-Length: {size}" if framing == "length" else "Transfer-Encoding: chunked"
    body = b" " * size if framing == "length" else b"%x\r\n%b\r\n0\r\n\r\n" % (size, b" " * size)
    head = request(
        HOST, f"Authorization: Bearer {key}", "Content-Type: application/json", wrap, start=f"POST {CHAT_PATH} HTTP/1.1"
    )
    with closing(connect(gateway)) as connection:
        connection.sendall(head)
        for at in range(0, len(body), 65_536):
            connection.sendall(body[at : at + 65_536])
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"connection: close" in answer and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_client_that_asks_first_is_told_before_it_sends(gateway: Gateway) -> None:
    lines = (HOST, f"Authorization: Bearer {KEY}", "Content-Length: 1000000", "Expect: 100-continue")

    def be_told() -> float:
        started = time.monotonic()
        status, error = send(gateway, request(*lines, start=f"POST {CHAT_PATH} HTTP/1.1"), "http.request")
        assert (status, error["code"]) == (413, "request_too_large")
        return time.monotonic() - started

    in_time(be_told, 1.5)  # nothing is on its way, so nothing is waited for


def test_a_client_that_was_refused_and_sends_for_ever_is_cut(gateway: Gateway) -> None:
    head = request(
        HOST, f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked", start=f"POST {CHAT_PATH} HTTP/1.1"
    )
    chunk = b"%x\r\n%b\r\n" % (1_000_000, b" " * 1_000_000)
    sent, started = 0, time.monotonic()
    with closing(connect(gateway)) as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(head)
        while sent < 1_000:
            connection.sendall(chunk)
            sent += 1
    # Cut after 64 MB, or after ten seconds of a machine that is busy with other things.
    assert sent <= 200 and (sent >= 60 or time.monotonic() - started >= 10)
