"""An OpenAI-compatible upstream on a real socket that answers, or misbehaves, as the user's message tells it to.

See `tests.support.script` for the language. The server runs in a thread of the test process and remembers every
call: what was asked, with which headers, and when the caller hung up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.script import Turn, chunks, completion, dump, read_turn
from tests.support.waiting import wait_for


@dataclass
class Call:
    """One request the upstream received. ``hung_up`` is set when the caller closes before the answer is complete."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    hung_up: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    hung_up_at: float = 0.0
    let_go: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Let an answer go on that ``hold=N`` has stopped."""
        self.let_go()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        messages: list[dict[str, Any]] = self.body.get("messages", [])
        return messages

    @property
    def system(self) -> str:
        """The system prompts, joined."""
        return "\n".join(str(m.get("content")) for m in self.messages if m["role"] in ("system", "developer"))

    @property
    def tool_results(self) -> list[str]:
        """What tools answered, in order."""
        return [str(m.get("content")) for m in self.messages if m["role"] == "tool"]


class ObedientUpstream:
    """A running upstream; ``url`` ends in ``/v1``."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="obedient-upstream", daemon=True)
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """The base URL for ``upstreams.yaml``."""
        return f"http://127.0.0.1:{self.port}/v1"

    def find(self, marker: str) -> list[Call]:
        """Every call whose conversation contains ``marker``."""
        return [call for call in list(self.calls) if marker in json.dumps(call.body, ensure_ascii=False)]

    def wait_for_call(self, marker: str, *, count: int = 1, timeout_s: float = 60.0) -> Call:
        """The ``count``-th call whose conversation contains ``marker``, as soon as it is there."""
        return wait_for(
            lambda: (self.find(marker) + [None] * count)[count - 1],
            timeout_s=timeout_s,
            what=f"call {count} with {marker!r} reaches the upstream",
        )

    def open(self) -> None:
        """Start serving."""
        self._thread.start()
        assert self._ready.wait(60), "the upstream did not start"

    def close(self) -> None:
        """Stop serving; every connection is closed."""
        if self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 26)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; say whether the connection may be used again."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            models = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "tests"}]}
            await _send(writer, _whole(dump(models)))
            return True
        gate = asyncio.Event()
        call = Call(path, headers, json.loads(raw), let_go=lambda: self._loop.call_soon_threadsafe(gate.set) and None)
        self.calls.append(call)
        answer = asyncio.ensure_future(self._answer(call, gate, writer))
        leaving = asyncio.ensure_future(_closed(reader))
        done, _ = await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answer not in done:
            call.hung_up_at = time.monotonic()
            call.hung_up.set()
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            return False
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        reusable = answer.result()
        call.finished.set()
        return reusable

    async def _answer(self, call: Call, gate: asyncio.Event, writer: asyncio.StreamWriter) -> bool:
        turn, number = read_turn(call.body), next(self._numbers)
        await asyncio.sleep(turn.seconds("wait"))
        call.started.set()
        if "status" in turn.options:
            return await _refuse(writer, turn)
        if turn.fault in _WHOLE_FAULTS:
            return await _WHOLE_FAULTS[turn.fault](writer, turn)
        if call.body.get("stream"):
            return await self._stream(call, gate, turn, number, writer)
        body = dump(completion(call.body, turn, number))
        if turn.fault == "cut":
            await _send(writer, _whole(body)[: -len(body) // 2])
            return False
        if turn.fault == "nofinish":
            body = body.replace(b'"finish_reason":"stop"', b'"finish_reason":null')
        if turn.options.get("hold"):
            await gate.wait()
        await _send(writer, _whole(body))
        return True

    async def _stream(
        self, call: Call, gate: asyncio.Event, turn: Turn, number: int, writer: asyncio.StreamWriter
    ) -> bool:
        await _send(writer, b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        hold = int(turn.options.get("hold", -1))
        strike = int(turn.options.get("at", 2)) if turn.fault else -1
        for index, chunk in enumerate(chunks(call.body, turn, number)):
            if index == hold:
                await gate.wait()
            if index == strike and turn.fault in _EVENTS:
                await _send(writer, _framed(_EVENTS[turn.fault]))
                if turn.fault in ("errorobject", "notjson", "badutf8event"):
                    break
            if index == strike and turn.fault == "cut":
                return False
            if index == strike and turn.fault == "reset":
                return _reset(writer)
            if index == strike and turn.fault == "stall":
                await asyncio.Event().wait()
            if index == strike and turn.fault == "comments":
                while True:
                    await _send(writer, _framed(b": still here\n\n"))
                    await asyncio.sleep(0.02)
            if index == strike and turn.fault == "endlessline":
                await _send(writer, _framed(b"data: "))
                while True:
                    await _send(writer, _framed(b"x" * 65536))
            await _send(writer, _framed(b"data: " + dump(chunk) + b"\n\n"))
            await asyncio.sleep(turn.seconds("delay"))
        if turn.fault == "nodone":
            await _send(writer, b"0\r\n\r\n")
            return True
        await _send(writer, _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return True


@contextmanager
def obedient_upstream() -> Iterator[ObedientUpstream]:
    """Run an upstream for the length of a block."""
    upstream = ObedientUpstream()
    upstream.open()
    try:
        yield upstream
    finally:
        upstream.close()


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(body: bytes, status: str = "200 OK", extra: str = "", kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n".encode() + body


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _closed(reader: asyncio.StreamReader) -> None:
    """Return when the caller hangs up. Callers do not pipeline, so any byte here would be a fault of theirs."""
    with contextlib.suppress(ConnectionError):
        assert not await reader.read(1), "a second request before the answer to the first"


def _reset(writer: asyncio.StreamWriter) -> bool:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


async def _refuse(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    """An error of the upstream's own, with details that must not travel further than they may."""
    options = turn.options
    error = {
        "message": turn.text or "canary-upstream-message",
        "type": "rate_limit_error" if options["status"] == "429" else "invalid_request_error",
        "param": options.get("param"),
        "code": options.get("code"),
    }
    extra = "x-upstream-secret: canary-upstream-header\r\n"
    if "retry" in options:
        extra += f"retry-after: {options['retry']}\r\n"
    await _send(writer, _whole(dump({"error": error}), f"{options['status']} Refused", extra))
    return True


async def _hang(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await asyncio.Event().wait()
    return False


async def _reset_now(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    return _reset(writer)


async def _close_now(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    return False


async def _html(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await _send(writer, _whole(b"<html><body>Sign in to canary-portal</body></html>", kind="text/html"))
    return True


async def _empty(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await _send(writer, _whole(b""))
    return True


async def _bad_json(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await _send(writer, _whole(b'{"id": "x", "choices": ['))
    return True


async def _bad_utf8(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await _send(writer, _whole(b'{"id": "\xff\xfe", "choices": []}'))
    return True


async def _zipped(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await _send(writer, _whole(gzip.compress(b"{}"), extra="content-encoding: gzip\r\n"))
    return True


async def _redirect(writer: asyncio.StreamWriter, turn: Turn) -> bool:
    await _send(writer, _whole(b"", "307 Temporary Redirect", "location: http://127.0.0.1:9/canary-elsewhere\r\n"))
    return True


_WHOLE_FAULTS = {
    "hang": _hang,
    "resetnow": _reset_now,
    "closenow": _close_now,
    "html": _html,
    "empty": _empty,
    "badjson": _bad_json,
    "badutf8": _bad_utf8,
    "gzip": _zipped,
    "redirect": _redirect,
}
"""Faults that replace the whole answer, streamed or not."""

_EVENTS = {
    "errorobject": b'data: {"error": {"message": "canary-overload", "type": "server_error", "code": null}}\n\n',
    "notjson": b"data: {this is not json}\n\n",
    "badutf8event": b'data: {"id": "\xff\xfe"}\n\n',
    "foreignkeys": (
        b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
        b'"event":{"type":"execute","data":"canary-script"},"selected_model_id":"canary-model"}\n\n'
    ),
}
"""Events that strike in the middle of a stream."""
