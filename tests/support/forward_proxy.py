"""A real HTTP proxy in a thread: absolute requests for http, CONNECT for https; over TLS, or broken, if wanted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class ForwardProxy:
    """``requests`` holds the request line of everything it was asked; ``refuse`` is a status it answers all with."""

    def __init__(
        self,
        *,
        credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        refuse: int | None = None,
        says: bytes | None = None,
        hangs: bool = False,
    ) -> None:
        self.requests: list[str] = []
        self.heads: list[dict[str, str]] = []
        self.connections = 0
        self._expected = "Basic " + base64.b64encode(credentials.encode()).decode() if credentials else None
        self._tls, self._refuse, self._says, self._hangs = tls, refuse, says, hangs
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="forward-proxy", daemon=True)
        self.port = 0

    def url(self, credentials: str = "") -> str:
        """The address for ``proxy``."""
        shown = f"{credentials}@" if credentials else ""
        return f"{'https' if self._tls else 'http'}://{shown}127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60), "the proxy did not start"
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
            task = asyncio.ensure_future(self._client(reader, writer))
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

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            line, *rest = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in rest)}
            self.requests.append(line)
            self.heads.append(headers)
            if self._hangs:
                await asyncio.Event().wait()
            if self._says is not None:
                writer.write(self._says)
                return
            if self._expected not in (None, headers.get("proxy-authorization")):
                writer.write(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")
                return
            if self._refuse is not None:
                writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % self._refuse)
                return
            method, target, version = line.split(" ")
            if method == "CONNECT":
                host, _, port = target.rpartition(":")
                source, upstream = await asyncio.open_connection(host, int(port))
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                parts = urlsplit(target)
                source, upstream = await asyncio.open_connection(parts.hostname, parts.port)
                path = parts.path + (f"?{parts.query}" if parts.query else "")
                kept = [field for field in rest if not field.lower().startswith("proxy-")]
                upstream.write("\r\n".join([f"{method} {path} {version}", *kept]).encode("latin-1"))
            first = [asyncio.ensure_future(_pump(reader, upstream)), asyncio.ensure_future(_pump(source, writer))]
            try:
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in first:
                    task.cancel()
                await asyncio.gather(*first, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            if upstream is not None:
                upstream.close()
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
