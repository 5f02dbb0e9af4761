"""An HTTP/2 server over TLS in front of a scripted upstream: each stream is one HTTP/1.1 connection behind it.

What the upstream does wrong arrives as HTTP/2 can say it: a cut or broken answer is a reset stream. A stream that the
client resets closes its connection behind, so that `ScriptedUpstream.wait_closed` sees it.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from types import TracebackType
from typing import Any, Self

import httptools
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import H2Error
from hyperframe.frame import GoAwayFrame


class Http2Bridge:
    """A running bridge to ``port``. ``rules`` change what it does: ``goaway_after``, ``refuse`` (a count), ``junk``."""

    def __init__(self, port: int, tls: ssl.SSLContext, **rules: Any) -> None:
        self.behind, self.rules = port, rules
        self.connections = 0
        self.streams: list[int] = []
        self.resets: list[int] = []
        self.open = 0
        self.most_open = 0
        self._tls = tls
        tls.set_alpn_protocols(["h2"])
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="http2-bridge", daemon=True)
        self.port = 0

    @property
    def base_url(self) -> str:
        """The address for ``upstreams.yaml``."""
        return f"https://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60), "the bridge did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            task = asyncio.ensure_future(_Client(self, reader, writer).run())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Client:
    """One HTTP/2 connection."""

    def __init__(self, bridge: Http2Bridge, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.bridge, self.reader, self.writer = bridge, reader, writer
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.requests: dict[int, tuple[dict[str, str], bytearray]] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.window = asyncio.Event()

    async def run(self) -> None:
        self.h2.initiate_connection()
        if "max_streams" in self.bridge.rules:
            self.h2.update_settings({3: self.bridge.rules["max_streams"]})
        try:
            if "junk" in self.bridge.rules:
                self.writer.write(self.bridge.rules["junk"])
            self.flush()
            while data := await self.reader.read(65536):
                for event in self.h2.receive_data(data):
                    self.handle(event)
                self.flush()
        except (OSError, H2Error, ssl.SSLError):
            pass
        finally:
            for task in self.tasks.values():
                task.cancel()
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)
            self.writer.transport.abort()

    def handle(self, event: Any) -> None:
        match event:
            case RequestReceived(stream_id=number, headers=headers):
                self.requests[number] = dict(headers), bytearray()
            case DataReceived(stream_id=number, data=data, flow_controlled_length=size):
                self.requests[number][1].extend(data)
                self.h2.acknowledge_received_data(size, number)
            case StreamEnded(stream_id=number):
                self.begin(number)
            case StreamReset(stream_id=number):
                self.bridge.resets.append(number)
                if number in self.tasks:
                    self.tasks[number].cancel()
            case WindowUpdated():
                self.window.set()

    def begin(self, number: int) -> None:
        rules = self.bridge.rules
        if rules.get("refuse", 0) > 0:
            rules["refuse"] -= 1
            self.h2.reset_stream(number, ErrorCodes.REFUSED_STREAM)
            return
        if rules.get("vanish", 0) > 0:
            rules["vanish"] -= 1
            self.writer.transport.abort()
            return
        self.bridge.streams.append(number)
        self.tasks[number] = asyncio.ensure_future(self.answer(number))
        if rules.get("goaway_after") == len(self.bridge.streams):
            self.writer.write(GoAwayFrame(0, last_stream_id=number).serialize())

    async def answer(self, number: int) -> None:
        headers, body = self.requests[number]
        self.bridge.open += 1
        self.bridge.most_open = max(self.bridge.most_open, self.bridge.open)
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.bridge.behind)
            lines = [f"{headers[':method']} {headers[':path']} HTTP/1.1", f"host: {headers[':authority']}"]
            lines += [f"{name}: {value}" for name, value in headers.items() if not name.startswith(":")]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
            await self.relay(number, reader)
        except (OSError, H2Error, httptools.HttpParserError, httptools.HttpParserUpgrade, EOFError):
            try:
                self.h2.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
                self.flush()
            except H2Error:
                pass
        finally:
            self.bridge.open -= 1
            if writer is not None:
                writer.transport.abort()

    async def relay(self, number: int, reader: asyncio.StreamReader) -> None:
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        sent_head = False
        while not answer.complete:
            data = await reader.read(65536)
            if not data:
                raise EOFError
            parser.feed_data(data)
            if answer.head_complete and not sent_head:
                sent_head = True
                fields = [(":status", str(parser.get_status_code())), *answer.headers]
                self.h2.send_headers(number, fields)
                self.flush()
            while answer.body:
                piece = answer.body.pop(0)
                while piece:
                    room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
                    if room <= 0:
                        self.window.clear()
                        await self.window.wait()
                        continue
                    self.h2.send_data(number, piece[:room])
                    piece = piece[room:]
                    self.flush()
                    await self.writer.drain()
        self.h2.end_stream(number)
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())


class _Answer:
    def __init__(self) -> None:
        self.headers: list[tuple[str, str]] = []
        self.body: list[bytes] = []
        self.head_complete = self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        text = name.decode().lower()
        if text not in ("transfer-encoding", "connection", "keep-alive"):
            self.headers.append((text, value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.head_complete = True

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.complete = True
