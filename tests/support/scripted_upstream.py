"""An OpenAI-compatible upstream on a real socket that answers what a test scripted, and misbehaves on request.

    with ScriptedUpstream() as upstream:
        upstream.enqueue(Answer(text="Hello."), fault("cut"))
        …                                     # talk to upstream.base_url
        upstream.wait_for_request(2).json["messages"]

Queued answers are taken first, in order; then what `script` set for the model's name, or for the text of the last
message; then a model or a last message ``fault:NAME`` commits that fault; everything else gets the default: the first
tool offered is called with arguments made from its schema (or with the JSON object that the last message holds), and a
tool result or a plain message is answered with text. ``/__enqueue`` and ``/__requests`` do the same over HTTP. Every
request is recorded; those for the list of models, which a gateway sends at its own time, are recorded apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tests.support.scripted_answers import Answer, Call, Gate, Steps, dump, obvious, status, steps_of, whole
from tests.support.scripted_faults import FAULTS, fault

__all__ = ["FAULTS", "Answer", "Call", "Gate", "Request", "ScriptedUpstream", "fault", "status"]


@dataclass
class Request:
    """One request the upstream received. ``closed`` is set when its connection is gone, at ``closed_at``.

    ``rested_s`` is how long its connection had been idle, 0 for a new one; ``cut`` says that we ended it ourselves.
    """

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    received_at: float
    rested_s: float = 0.0
    cut: bool = False
    sent_bytes: int = 0
    finished: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    closed_at: float = 0.0

    @property
    def json(self) -> dict[str, Any]:
        """The body as JSON; empty for a form."""
        if self.headers.get("content-type", "").startswith("multipart/"):
            return {}
        decoded: dict[str, Any] = json.loads(self.body or b"{}")
        return decoded


class ScriptedUpstream:
    """A running upstream. ``base_url`` ends in ``/v1``; `requests` grows while tests talk to it.

    ``listings`` are the requests for the list of models: discovery and health checks send them beside what a test does.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.listings: list[Request] = []
        self.connections = 0
        self._tls = tls
        self._queue: list[Answer] = []
        self._listings: list[Answer] = []
        self._scripts: dict[str, Answer] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, name="scripted-upstream", daemon=True)
        self.port = 0

    @property
    def base_url(self) -> str:
        """The address for ``upstreams.yaml``."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    def enqueue(self, *answers: Answer) -> None:
        """Answer the next requests with these, in order; those for the list of models are asked at their own time."""
        with self._changed:
            self._queue.extend(answers)

    def enqueue_listings(self, *answers: Answer) -> None:
        """Answer the next requests for the list of models with these, in order."""
        with self._changed:
            self._listings.extend(answers)

    def clear(self) -> None:
        """Forget the answers that were enqueued and not used."""
        with self._changed:
            self._queue.clear()
            self._listings.clear()

    def script(self, name: str, answer: Answer) -> None:
        """Answer every request for the model ``name``, or whose last message says ``name``, with this."""
        with self._changed:
            self._scripts[name] = answer

    def gate(self) -> Gate:
        """Make a gate for an answer."""
        return Gate(self._loop)

    def wait_for_request(self, count: int = 1, timeout_s: float = 60.0) -> Request:
        """Return the ``count``-th request as soon as it is there."""
        with self._changed:
            there = self._changed.wait_for(lambda: len(self.requests) >= count, timeout_s)
            assert there, f"request {count} did not come within {timeout_s:g} s"
            return self.requests[count - 1]

    def wait_closed(self, count: int = 1, timeout_s: float = 60.0) -> float:
        """Return when the connection of the ``count``-th request is gone: the moment, on the monotonic clock."""
        request = self.wait_for_request(count, timeout_s)
        assert request.closed.wait(timeout_s), f"request {count} is still connected after {timeout_s:g} s"
        return request.closed_at

    def close_idle(self) -> None:
        """Close every connection, as a server does with idle ones."""
        done = threading.Event()

        def close() -> None:
            for writer in list(self._writers):
                writer.close()
            done.set()

        self._loop.call_soon_threadsafe(close)
        assert done.wait(60)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60), "the upstream did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.get_running_loop().create_server(
            lambda: _Wire(self._accept), "127.0.0.1", 0, ssl=self._tls, backlog=512
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def _accept(self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._connection(wire, reader, writer, self.connections))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(
        self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        mine: list[Request] = []
        self._writers.add(writer)
        try:
            rests_since: float | None = None
            while True:
                request = await self._receive(reader, number)
                if rests_since is not None:
                    request.rested_s = request.received_at - rests_since
                mine.append(request)
                answering = asyncio.ensure_future(self._answer(request, writer))
                leaving = asyncio.ensure_future(wire.gone.wait())
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                leaving.cancel()
                answering.cancel()
                results = await asyncio.gather(answering, leaving, return_exceptions=True)
                if results[0] is not True:
                    break
                rests_since = time.monotonic()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
            with self._changed:
                for request in mine:
                    request.closed_at = time.monotonic()
                    request.closed.set()
                self._changed.notify_all()

    async def _receive(self, reader: asyncio.StreamReader, connection: int) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join([piece async for piece in _chunks(reader)])
        else:
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        with self._changed:
            kept = self.listings if _is_listing(path) else self.requests
            request = Request(len(kept) + 1, method, path, headers, body, connection, time.monotonic())
            if not path.startswith("/__"):
                kept.append(request)
            self._changed.notify_all()
        return request

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Send the answer; return whether the connection may be used again."""
        async for step in _paced(self._steps(request)):
            if isinstance(step, bytes):
                writer.write(step)
                request.sent_bytes += len(step)
                await writer.drain()
            elif step == "hang":
                await asyncio.Event().wait()
            else:
                request.cut = True
                if step == "reset":
                    _reset(writer)
                return False
        request.finished.set()
        return True

    def _steps(self, request: Request) -> Steps:
        path = request.path.partition("?")[0]
        if path == "/__requests":
            seen = [{"path": r.path, "headers": r.headers, "json": r.json} for r in self.requests]
            return [whole(200, dump({"requests": seen}))]
        if path == "/__enqueue":
            fields = request.json
            name = fields.pop("fault", None)
            fields["calls"] = [Call(**call) for call in fields.get("calls", ())]
            self.enqueue(fault(name) if name else Answer(**fields))
            return [whole(200, b"{}")]
        if _is_listing(path):
            data = [{"id": "scripted", "object": "model", "created": 1, "owned_by": "tests"}]
            with self._changed:
                listing = self._listings.pop(0) if self._listings else Answer(body={"object": "list", "data": data})
            return steps_of(listing, request.path, request.json)
        if path.endswith("/embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}]
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            return self._next(request, Answer(body={"object": "list", "data": data, "model": "e", "usage": usage}))
        return self._next(request, None)

    def _next(self, request: Request, default: Answer | None) -> Steps:
        names = str(request.json.get("model", "")), _last_text(request.json)
        with self._changed:
            answer = self._queue.pop(0) if self._queue else None
            answer = answer or self._scripts.get(names[0]) or self._scripts.get(names[1])
        if answer is None:
            faults = [name.removeprefix("fault:") for name in names if name.startswith("fault:")]
            answer = fault(faults[0]) if faults else default
        return steps_of(answer or obvious(request.json), request.path, request.json)


def _is_listing(path: str) -> bool:
    return path.partition("?")[0].endswith("/models")


def _last_text(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    return content if isinstance(content, str) else ""


class _Wire(asyncio.StreamReaderProtocol):
    """Tells at once when the other side has gone."""

    def __init__(self, accept: Callable[[_Wire, asyncio.StreamReader, asyncio.StreamWriter], None]) -> None:
        self.gone = asyncio.Event()
        super().__init__(asyncio.StreamReader(limit=1 << 26), lambda r, w: accept(self, r, w))

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        super().connection_lost(exc)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


async def _paced(steps: Steps) -> AsyncIterator[bytes | str]:
    for step in steps:
        if isinstance(step, float | int):
            await asyncio.sleep(step)
        elif isinstance(step, asyncio.Event):
            await step.wait()
        else:
            yield step


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main() -> None:
    """Run until interrupted, printing the base URL: an upstream for another process."""
    with ScriptedUpstream() as upstream, contextlib.suppress(KeyboardInterrupt):
        print(upstream.base_url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
