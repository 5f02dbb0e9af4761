"""Everything an OpenAI upstream has beside chat, through the official client: judged, relayed as bytes, governed."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.house import ADMIN, CHAT, NARROW, UPSTREAM_KEY, write_agent
from tests.support.scripted_answers import LAST, STREAM_HEAD, Answer, dump, frame, sse, whole
from tests.support.scripted_upstream import Request, ScriptedUpstream
from tests.support.server import UVICORN, Gateway, running_gateway
from tests.support.waiting import wait_for

SECURITY = f"""\
version: 1
api_keys:
  - id: admin
    hashed_key: "{hashlib.sha256(ADMIN.encode()).hexdigest()}"
    allow_agents: ["*"]
    scopes: [chat, admin]
  - id: chat
    hashed_key: "{hashlib.sha256(CHAT.encode()).hexdigest()}"
    allow_agents: ["up/*", "gpt-*", "default/*"]
  - id: narrow
    hashed_key: "{hashlib.sha256(NARROW.encode()).hexdigest()}"
    allow_agents: ["up/m-1", "up/whisper*"]
"""
UPSTREAMS = """\
version: 1
upstreams:
  - name: up
    base_url: {url}
    api_key: {key}
    models: ["m-*", embed, tts-1, "whisper*", omni]
    timeouts: {{connect_s: 2, first_byte_s: 10, idle_s: 10, total_s: 30}}
  - name: other
    base_url: {url}
    api_key: {key}
    priority: 2
    models: [x]
aliases:
  gpt-4o: up/m-1
  "o3*": up/m-1
"""
RIFF = b"RIFF" + bytes(range(256)) * 400
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as upstream:
        data = [{"id": name, "object": "model"} for name in ("m-1", "m-2", "secret")]
        upstream.enqueue_listings(Answer(body={"object": "list", "data": data}))
        yield upstream


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory, server: ScriptedUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("relayed")
    (home / "security.yaml").write_text(SECURITY)
    (home / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
    (home / "upstreams.yaml").write_text(UPSTREAMS.format(url=server.base_url, key=UPSTREAM_KEY))
    write_agent(home / "agents", "Writer", "You write.", extra='__gateway__ = {"model": "up/m-1"}\n')
    env = {"GATEWAY_REQUEST_BODY_LIMIT_BYTES": "200000", "GATEWAY_UPLOAD_LIMIT_BYTES": "3000000"}
    with running_gateway(home, env=env, key=ADMIN) as gateway:
        wait_for(lambda: "up/m-2" in gateway.model_ids(), what="the upstream's models are listed")
        yield gateway


@pytest.fixture
def api(gate: Gateway, openai_client: Callable[..., OpenAI]) -> OpenAI:
    return openai_client(gate)


@pytest.fixture
def asked(server: ScriptedUpstream) -> Callable[[], Request]:
    """The one request that the test made of the upstream."""
    before = len(server.requests)

    def only() -> Request:
        assert len(server.requests) == before + 1
        return server.requests[before]

    return only


def test_models_are_named_discovered_and_aliased(gate: Gateway) -> None:
    assert gate.model_ids() == {
        "up/embed", "up/tts-1", "up/omni", "up/m-1", "up/m-2", "other/x", "gpt-4o", "default/writer",
    }  # fmt: skip
    assert gate.model_ids(key=NARROW) == {"up/m-1"}
    assert gate.get("/v1/models/gpt-4o", key=CHAT).json()["metadata"]["kind"] == "upstream"
    assert gate.get("/v1/models/o3").status == 404
    assert gate.get("/v1/models/gpt-4o", key=NARROW).status == 403


def test_an_alias_is_a_model(api: OpenAI, asked: Callable[[], Request]) -> None:
    answer = api.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])
    assert answer.model == "gpt-4o"
    assert asked().json["model"] == "m-1"


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_embeddings(
    gate: Gateway, openai_client: Callable[..., OpenAI], server: ScriptedUpstream, asked: Any, prefix: str
) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}]
    server.enqueue(Answer(body={"object": "list", "data": data, "model": "e", "usage": USAGE, "more": {"a": 1}}))
    answer = openai_client(gate, prefix=prefix).embeddings.create(
        model="up/embed", input=["a"], encoding_format="float", extra_body={"truncate": True}
    )
    assert answer.data[0].embedding == [0.25, -0.5]
    assert answer.model == "up/embed"
    assert answer.model_extra == {"more": {"a": 1}}
    request = asked()
    assert request.path == "/v1/embeddings"
    assert request.json == {"model": "embed", "input": ["a"], "encoding_format": "float", "truncate": True}
    assert request.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    gate.logged("run.finished", model="up/embed", input_tokens=2)


def test_embeddings_as_the_client_asks_for_them(
    api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]
) -> None:
    """By itself it asks for base64, which is a text where the list would be; input may be tokens."""
    packed = base64.b64encode(struct.pack("<2f", 0.25, -0.5)).decode()
    data = [{"object": "embedding", "index": 0, "embedding": packed}]
    server.enqueue(Answer(body={"object": "list", "data": data, "model": "e", "usage": USAGE}))
    answer = api.embeddings.create(model="up/embed", input=[[1, 2, 3]], dimensions=2)
    assert answer.data[0].embedding == [0.25, -0.5]
    assert answer.usage.prompt_tokens == 2
    assert asked().json == {"model": "embed", "input": [[1, 2, 3]], "encoding_format": "base64", "dimensions": 2}


def test_completions(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]) -> None:
    choice = {"index": 0, "text": "there", "finish_reason": "stop", "logprobs": None}
    body = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    server.enqueue(Answer(body=body, headers={"x-request-id": "req_up", "x-ratelimit-remaining-requests": "9"}))
    raw = api.completions.with_raw_response.create(model="up/m-1", prompt="Hello", extra_body={"top_k": 3})
    answer = raw.parse()
    assert (answer.choices[0].text, answer.model) == ("there", "up/m-1")
    assert raw.headers["x-upstream-request-id"] == "req_up"
    assert raw.headers["x-upstream-ratelimit-remaining-requests"] == "9"
    assert raw.headers["x-request-id"] != "req_up"
    assert "x-ratelimit-remaining-requests" not in raw.headers
    assert asked().json == {"model": "m-1", "prompt": "Hello", "top_k": 3}


def text_chunk(text: str, finish: str | None = None, **extra: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], **extra}


def test_completions_stream(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]) -> None:
    last = {**text_chunk(""), "choices": [], "usage": USAGE}
    frames = sse(text_chunk("the", event={"type": "execute"}), text_chunk("re", "stop"), last, b"[DONE]")
    server.enqueue(Answer(steps=lambda _: [STREAM_HEAD, *frames, LAST]))
    with api.completions.create(model="up/m-1", prompt="Hello", stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "there"
    assert all(chunk.model == "up/m-1" and not chunk.model_extra for chunk in chunks)
    request = asked()
    assert request.path == "/v1/completions"
    assert request.json["stream_options"] == {"include_usage": True}


def test_a_completion_that_is_cut_is_an_error(api: OpenAI, server: ScriptedUpstream) -> None:
    server.enqueue(Answer(steps=lambda _: [STREAM_HEAD, *sse(text_chunk("the"), b"[DONE]"), LAST]))
    with pytest.raises(openai.APIError), api.completions.create(model="up/m-1", prompt="x", stream=True) as stream:
        list(stream)


def test_speech(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]) -> None:
    server.enqueue(Answer(body=RIFF, headers={"content-type": "audio/wav", "x-request-id": "req_up"}))
    answer = api.audio.speech.create(model="up/tts-1", voice="alloy", input="Hi", response_format="wav")
    assert answer.content == RIFF
    assert answer.response.headers["content-type"] == "audio/wav"
    assert answer.response.headers["x-upstream-request-id"] == "req_up"
    assert asked().json == {"model": "tts-1", "voice": "alloy", "input": "Hi", "response_format": "wav"}


def test_speech_comes_as_it_is_spoken(api: OpenAI, server: ScriptedUpstream) -> None:
    gate = server.gate()
    head = STREAM_HEAD.replace(b"text/event-stream; charset=utf-8", b"audio/mpeg")
    server.enqueue(Answer(steps=lambda _: [head, frame(b"one"), gate.event, frame(b"two"), LAST]))
    with api.audio.speech.with_streaming_response.create(model="up/tts-1", voice="alloy", input="Hi") as answer:
        pieces = answer.iter_bytes()
        assert next(pieces) == b"one"
        gate.open()
        assert b"".join(pieces) == b"two"


@pytest.mark.parametrize("size", [1_000, 1_500_000])
def test_transcription(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request], size: int) -> None:
    server.enqueue(Answer(body={"text": "Hello."}))
    audio = (RIFF * (size // len(RIFF) + 1))[:size]
    answer = api.audio.transcriptions.create(model="up/whisper-1", file=("a.wav", audio), language="en")
    assert answer.text == "Hello."
    request = asked()
    assert request.path == "/v1/audio/transcriptions"
    assert audio in request.body
    assert b'name="model"\r\n\r\nwhisper-1\r\n' in request.body
    assert b"up/whisper-1" not in request.body
    assert int(request.headers["content-length"]) == len(request.body)
    assert f"--{request.headers['content-type'].partition('boundary=')[2]}--\r\n".encode() in request.body


def test_images_and_moderations(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]) -> None:
    server.enqueue(Answer(body={"created": 1, "data": [{"b64_json": "AA=="}]}))
    made = api.images.generate(prompt="a cat", size="256x256")
    assert made.data is not None
    assert made.data[0].b64_json == "AA=="
    assert asked().json == {"prompt": "a cat", "size": "256x256"}


def test_image_edit(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]) -> None:
    server.enqueue(Answer(body={"created": 1, "data": [{"b64_json": "AA=="}]}))
    api.images.edit(model="up/omni", image=("a.png", RIFF, "image/png"), prompt="more cat")
    assert b'name="model"\r\n\r\nomni\r\n' in asked().body


def test_moderation(api: OpenAI, server: ScriptedUpstream, asked: Callable[[], Request]) -> None:
    server.enqueue(Answer(body={"id": "modr", "model": "omni", "results": []}))
    assert api.moderations.create(model="up/omni", input="x").id == "modr"
    assert asked().json == {"model": "omni", "input": "x"}


def test_files(api: OpenAI, server: ScriptedUpstream) -> None:
    first = len(server.requests)
    record = {"id": "file-1", "object": "file", "bytes": 3, "created_at": 1, "filename": "a", "purpose": "batch"}
    server.enqueue(
        Answer(body=record),
        Answer(body={"object": "list", "data": [record], "has_more": False}),
        Answer(body=record),
        Answer(body=b"<script>", headers={"content-type": "text/html"}),
        Answer(body={"id": "file-1", "object": "file", "deleted": True}),
    )
    assert api.files.create(file=("a.jsonl", b'{"a": 1}'), purpose="batch").id == "file-1"
    assert [file.id for file in api.files.list(limit=2, purpose="batch").data] == ["file-1"]
    assert api.files.retrieve("file-1").filename == "a"
    content = api.files.content("file-1")
    assert content.content == b"<script>"
    assert content.response.headers["content-type"] == "application/octet-stream"
    assert content.response.headers["x-content-type-options"] == "nosniff"
    assert api.files.delete("file-1").deleted
    seen = [(request.method, request.path) for request in server.requests[first:]]
    assert (
        seen
        == [
            ("POST", "/v1/files"),
            ("GET", "/v1/files?purpose=batch&limit=2"),
            ("GET", "/v1/files/file-1"),
            ("GET", "/v1/files/file-1/content"),
            ("DELETE", "/v1/files/file-1"),
        ]
        or seen[1][1] == "/v1/files?limit=2&purpose=batch"
    )


def test_a_file_that_is_not_there(api: OpenAI, server: ScriptedUpstream) -> None:
    server.enqueue(Answer(status=404, body={"error": {"message": "No such File object: file-9"}}))
    with pytest.raises(openai.NotFoundError) as missing:
        api.files.retrieve("file-9")
    assert missing.value.code == "not_found"


def test_batches(api: OpenAI, server: ScriptedUpstream) -> None:
    first = len(server.requests)
    record = {
        "id": "batch_1", "object": "batch", "endpoint": "/v1/embeddings", "input_file_id": "f", "created_at": 1,
        "completion_window": "24h", "status": "validating",
    }  # fmt: skip
    server.enqueue(Answer(body=record), Answer(body=record | {"status": "cancelling"}))
    made = api.batches.create(completion_window="24h", endpoint="/v1/embeddings", input_file_id="f")
    assert api.batches.cancel(made.id).status == "cancelling"
    assert [request.path for request in server.requests[first:]] == ["/v1/batches", "/v1/batches/batch_1/cancel"]


def test_a_call_without_a_model_needs_the_whole_upstream(gate: Gateway, server: ScriptedUpstream) -> None:
    before = len(server.requests)
    assert gate.get("/v1/files", key=NARROW).json()["error"]["code"] == "permission_denied"
    assert gate.get("/v1/files", key=CHAT, headers={"x-gateway-upstream": "other"}).status == 403
    assert gate.get("/v1/files", key=ADMIN, headers={"x-gateway-upstream": "nobody"}).status == 404
    answer = gate.post("/v1/moderations", {"input": "x"}, key=NARROW)
    assert answer.status == 403
    assert len(server.requests) == before
    server.enqueue(Answer(body={"object": "list", "data": []}))
    assert gate.get("/v1/files", key=ADMIN, headers={"x-gateway-upstream": "other"}).status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/audio/speech", "/v1/images/generations"])
def test_the_access_list_holds_everywhere(gate: Gateway, server: ScriptedUpstream, path: str) -> None:
    before = len(server.requests)
    assert gate.post(path, {"model": "up/tts-1", "input": "x"}, key=NARROW).status == 403
    assert gate.post(path, {"model": "nobody/x", "input": "x"}).json()["error"]["code"] == "model_not_found"
    smuggled = b'{"model": "up/m-1", "input": "x", "mod\\u0065l": "up/tts-1"}'
    assert gate.request("POST", path, body=smuggled, key=NARROW).status == 400
    assert len(server.requests) == before


def test_the_access_list_holds_in_forms(
    gate: Gateway, openai_client: Callable[..., OpenAI], server: ScriptedUpstream
) -> None:
    before = len(server.requests)
    narrow = openai_client(gate, key=NARROW)
    with pytest.raises(openai.PermissionDeniedError):
        narrow.audio.transcriptions.create(model="up/tts-1", file=("a.wav", RIFF))
    with pytest.raises(openai.BadRequestError, match="write 'model'"):
        narrow.audio.transcriptions.create(
            model="up/whisper-1", file=("a.wav", RIFF), extra_body={"model": ["up/whisper-1", "up/tts-1"]}
        )
    assert len(server.requests) == before


def test_a_second_model_behind_the_file_ends_the_upload(gate: Gateway, server: ScriptedUpstream) -> None:
    before, boundary = len(server.requests), "0123456789abcdef0123456789abcdef"

    def field(name: str, value: bytes, extra: str = "") -> bytes:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
        return head.encode() + value + b"\r\n"

    form = field("model", b"up/whisper-1") + field("file", RIFF * 15, '; filename="a.wav"')
    form += field("model", b"up/tts-1") + f"--{boundary}--\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = gate.request("POST", "/v1/audio/transcriptions", body=form, key=NARROW, headers=headers)
    assert answer.status == 400
    assert "more than once" in answer.error["message"]
    assert len(server.requests) == before, "the upstream has got a whole request"


def test_an_event_stream_that_is_cut_says_so(gate: Gateway, server: ScriptedUpstream) -> None:
    event = {"type": "speech.audio.delta", "audio": "AA=="}
    server.enqueue(Answer(steps=lambda _: [STREAM_HEAD, *sse(event), "close"]))
    body = {"model": "up/tts-1", "input": "x", "stream_format": "sse"}
    with gate.stream("POST", "/v1/audio/speech", json_body=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = list(stream.data())
    assert json.loads(events[0]) == event
    assert json.loads(events[-1])["error"]["code"] == "upstream_incomplete"


ERROR = {"error": {"message": UPSTREAM_KEY}}
PARTIAL = {"type": "image_generation.partial_image", "b64_json": "AA=="}
HALF = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"created":1'
OPEN_HEAD = STREAM_HEAD.replace(b"transfer-encoding: chunked\r\n", b"")
UNFINISHED: dict[str, tuple[list[Any], str]] = {
    "an error object": ([whole(200, dump(ERROR))], "upstream_error"),
    "nothing": ([whole(200, b"")], "upstream_malformed"),
    "half of it": ([HALF, "close"], "upstream_malformed"),
    "a page that says it is JSON": ([whole(200, b"<html>")], "upstream_malformed"),
    "an error in a stream": ([STREAM_HEAD, *sse(PARTIAL, ERROR), LAST], "upstream_error"),
    "an event of an error": ([STREAM_HEAD, *sse({"type": "error", "message": UPSTREAM_KEY}), LAST], "upstream_error"),
    "a stream without an end": ([STREAM_HEAD, *sse(PARTIAL), LAST], "upstream_incomplete"),
    "a stream without events": ([STREAM_HEAD, LAST], "upstream_incomplete"),
    "half an event": ([OPEN_HEAD, b'data: {"type": "x"}\n\ndata: {"type"', "close"], "upstream_incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFINISHED)
def test_an_answer_that_is_not_finished_is_an_error(gate: Gateway, server: ScriptedUpstream, case: str) -> None:
    steps, code = UNFINISHED[case]
    server.enqueue(Answer(steps=lambda _: steps))
    answer = gate.post("/v1/images/generations", {"model": "up/omni", "prompt": "x"})
    events = [line for line in answer.body.split(b"\n") if line.startswith(b"data:")]
    error = json.loads(events[-1][5:] if events else answer.body)["error"]
    assert error["code"] == code
    assert UPSTREAM_KEY.encode() not in answer.body
    assert answer.status == (502 if not events else 200)


def test_events_pass_as_they_come_however_large(gate: Gateway, server: ScriptedUpstream) -> None:
    large = {"type": "image_generation.completed", "b64_json": "A" * 300_000}
    text = b"".join(b"event: x\r\ndata: %b\r\n\r\n" % json.dumps(e).encode() for e in (PARTIAL, large, PARTIAL, large))
    pieces = [text[start : start + 7_001] for start in range(0, len(text), 7_001)]
    server.enqueue(Answer(steps=lambda _: [STREAM_HEAD, *map(frame, pieces), LAST]))
    assert gate.post("/v1/images/generations", {"model": "up/omni", "stream": True}).body == text


def test_a_large_json_answer_passes_and_its_end_is_looked_at(gate: Gateway, server: ScriptedUpstream) -> None:
    body = b'{"created":1,"data":[{"b64_json":"' + b"A" * 6_000_000 + b'"}]}'
    server.enqueue(Answer(body=body))
    assert gate.post("/v1/images/generations", {"model": "up/omni"}).body == body
    cut = [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + body[:-9], "close"]
    server.enqueue(Answer(steps=lambda _: cut))
    with pytest.raises(IncompleteRead):
        gate.post("/v1/images/generations", {"model": "up/omni"})


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/audio/speech", "/v1/moderations"])
def test_an_agent_answers_on_chat_alone(gate: Gateway, path: str) -> None:
    answer = gate.post(path, {"model": "default/writer", "input": "x"})
    assert answer.status == 400
    assert answer.error["code"] == "unsupported_value"
    assert "/v1/chat/completions" in answer.error["message"]


def test_errors_stay_what_they_are(api: OpenAI, server: ScriptedUpstream) -> None:
    said = {"message": f"bad {UPSTREAM_KEY}", "type": "odd", "param": "voice", "code": "voice_unknown", "hint": 1}
    server.enqueue(Answer(status=422, body={"error": said}))
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        api.audio.speech.create(model="up/tts-1", voice="x", input="Hi")
    assert refused.value.body == said | {"message": "bad ***"}
    server.enqueue(Answer(status=429, body={"error": {"message": "slow"}}, headers={"retry-after": "7"}))
    with pytest.raises(openai.RateLimitError) as limited:
        api.images.generate(model="up/omni", prompt="x")
    assert limited.value.response.headers["retry-after"] == "7"
    server.enqueue(Answer(status=401, body={"error": {"message": "canary"}}))
    with pytest.raises(openai.InternalServerError) as mapped:
        api.files.list()
    assert mapped.value.status_code == 502
    assert "canary" not in str(mapped.value.body)


def test_bytes_that_are_cut_are_not_taken_for_a_whole(gate: Gateway, server: ScriptedUpstream) -> None:
    head = STREAM_HEAD.replace(b"text/event-stream; charset=utf-8", b"audio/mpeg")
    server.enqueue(Answer(steps=lambda _: [head, frame(b"one"), "close"]))
    with socket.create_connection(("127.0.0.1", gate.port), 60) as client:
        body = json.dumps({"model": "up/tts-1", "input": "x"}).encode()
        client.sendall(
            b"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-type: application/json"
            b"\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
        )
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    assert b"one" in answer
    assert not answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("command", [UVICORN, ("-m", "gateway_cli", "serve", "--port")])
@pytest.mark.parametrize("framed", [True, False])
def test_an_answer_that_is_cut_is_no_error_of_the_server(
    server: ScriptedUpstream, tmp_path: Path, command: tuple[str, ...], framed: bool
) -> None:
    (tmp_path / "upstreams.yaml").write_text(UPSTREAMS.format(url=server.base_url, key=UPSTREAM_KEY), encoding="utf-8")
    (tmp_path / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
    length = b"content-length: 900000\r\n" if framed else b"transfer-encoding: chunked\r\n"
    part = RIFF if framed else b"%x\r\n%b\r\n" % (len(RIFF), RIFF)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\n" + length + b"\r\n"
    with running_gateway(tmp_path, env={"GATEWAY_API_KEY": ADMIN}, key=ADMIN, command=command) as gateway:
        server.enqueue(Answer(steps=lambda _: [head + part, "close"]))
        body = {"model": "up/tts-1", "input": "x", "voice": "v"}
        with pytest.raises((IncompleteRead, ConnectionError)):
            gateway.post("/v1/audio/speech", body, headers={"x-request-id": "cut-1"})
        gateway.logged("http.request", request_id="cut-1")
        (ended,) = gateway.logged("run.finished", request_id="cut-1")
        assert (ended["level"], ended["outcome"]) == ("warning", "failure")
        # The server's own lines have no event: what was done on purpose is none of its errors.
        assert [line for line in gateway.log_lines() if line["event"] is None and line["level"] == "error"] == []


def test_uploads_are_bounded(gate: Gateway, server: ScriptedUpstream) -> None:
    before = len(server.requests)
    connection = HTTPConnection("127.0.0.1", gate.port, timeout=60)
    try:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("authorization", f"Bearer {CHAT}")
        connection.putheader("content-type", "multipart/form-data; boundary=0123456789abcdef")
        connection.putheader("content-length", "3000001")
        connection.endheaders()
        assert connection.getresponse().status == 413
    finally:
        connection.close()
    assert len(server.requests) == before


def test_a_client_that_leaves_an_upload_takes_it_along(gate: Gateway) -> None:
    before = len(gate.log_events("http.client.gone"))
    with socket.create_connection(("127.0.0.1", gate.port), 60) as client:
        client.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: 100000\r\n"
            b"content-type: multipart/form-data; boundary=0123456789abcdef\r\n\r\n--0123456789abcdef\r\n"
            % CHAT.encode()
        )
    gate.logged("http.client.gone", count=before + 1)
    assert gate.get("/health").status == 200


@pytest.mark.parametrize("path", ["/v1/files/..", "/v1/files/a%2Fb", "/v1/files/a%0d%0ab", "/v1/batches/%2e%2e/cancel"])
def test_ids_cannot_leave_their_place(gate: Gateway, server: ScriptedUpstream, path: str) -> None:
    before = len(server.requests)
    for method in ("GET", "POST", "DELETE"):
        assert gate.request(method, path, key=CHAT).status in (400, 404, 405)
    assert len(server.requests) == before


def test_upstreams_are_shown_and_refreshed(gate: Gateway, server: ScriptedUpstream) -> None:
    path = Path(gate.home) / "upstreams.yaml"
    text = path.read_text()
    rows = gate.post("/upstreams/refresh").json()
    assert [(row["name"], row["healthy"], row["priority"]) for row in rows] == [("up", True, 1), ("other", True, 2)]
    assert rows == gate.get("/admin/upstreams").json()
    assert rows[0]["base_url"] == server.base_url
    assert rows[0]["health_path"] == "/models"
    assert rows[0]["last_checked"].endswith("Z")
    assert rows[0]["last_error"] is None
    assert UPSTREAM_KEY not in json.dumps(rows)
    try:
        path.write_text(text.replace("priority: 2", "priority: zero"))
        refused = gate.post("/upstreams/refresh")
        assert refused.status == 400
        assert "upstreams.yaml:11" in refused.json()["error"]["message"]
        assert len(gate.get("/upstreams").json()) == 2
        path.write_text(
            text.replace(
                f"name: other\n    base_url: {server.base_url}", "name: other\n    base_url: http://127.0.0.1:9/v1"
            )
        )
        rows = gate.post("/upstreams/refresh").json()
        assert [row["healthy"] for row in rows] == [True, False]
        assert "cannot be reached" in rows[1]["last_error"]
    finally:
        path.write_text(text)
        gate.post("/upstreams/refresh")
    assert gate.get("/upstreams", key=CHAT).status == 403
