"""Peer: one end of the channel between a worker and its supervisor; either side may call the other."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from gateway.errors import GatewayError
from gateway.observability.logs import log_event
from gateway.workers.failures import Failure

Handler = Callable[[Any], Awaitable[Any]]

_LOG = logging.getLogger("gateway.workers")
_LENGTH = struct.Struct("!I")
_MOST = 256 * 1024 * 1024


class CallFailed(Exception):
    """The other side could not do what it was asked, or is gone; the text says why and may be shown.

    ``failure`` is the error, where it was one that the gateway can explain.
    """

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class _Frame(msgspec.Struct, array_like=True):
    """A call has an id and a name; a notice a name alone; an answer an id and a value, or an error."""

    id: int = 0
    name: str = ""
    value: Any = None
    error: str | None = None
    failure: Failure | None = None


class Peer:
    """Speaks over one end of a socket pair, once it is open; `run` reads until the other side is gone.

    Values are what MessagePack knows. A handler's `GatewayError` reaches the caller as it is (`CallFailed.failure`),
    anything else as the name of its class: the log of the side that failed has the rest.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._handlers: dict[str, Handler] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_id = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(_Frame).decode

    def handle(self, name: str, handler: Handler) -> None:
        """Have ``handler`` answer calls and notices of that name."""
        self._handlers[name] = handler

    async def call(self, name: str, value: Any = None, *, timeout_s: float) -> Any:
        """Return what the other side's handler returns; raises `CallFailed`, also when ``timeout_s`` have passed."""
        self._last_id += 1
        number = self._last_id
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(_Frame(number, name, value))
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise CallFailed(f"no answer within {timeout_s:g} s") from error
        finally:
            del self._calls[number]

    def notify(self, name: str, value: Any = None) -> None:
        """Tell the other side something; raises `CallFailed` when it is gone."""
        self._send(_Frame(0, name, value))

    async def open(self) -> None:
        """Begin to speak."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._end)

    async def run(self) -> None:
        """Read and answer until the other side is gone, then fail every call under way."""
        reader = self._reader
        assert reader is not None, "the channel is not open"
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > _MOST:
                    return
                self._take(self._decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            self.close()

    def close(self) -> None:
        """Hang up; calls under way fail."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(CallFailed("the other process is gone"))
        for task in self._tasks:
            task.cancel()

    def _send(self, frame: _Frame) -> None:
        if self._writer is None or self._writer.is_closing():
            raise CallFailed("the other process is gone")
        data = self._encode(frame)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    def _take(self, frame: _Frame) -> None:
        if frame.name:
            task = asyncio.create_task(self._serve(frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        answer = self._calls.get(frame.id)
        if answer is not None and not answer.done():
            if frame.error is None:
                answer.set_result(frame.value)
            else:
                answer.set_exception(CallFailed(frame.error, frame.failure))

    async def _serve(self, frame: _Frame) -> None:
        answer = _Frame(frame.id)
        try:
            handler = self._handlers.get(frame.name)
            if handler is None:
                raise CallFailed(f"nothing answers to '{frame.name}' yet")
            answer.value = await handler(frame.value)
        except CallFailed as error:
            answer.error, answer.failure = str(error), error.failure
        except GatewayError as error:
            answer.error, answer.failure = error.message, Failure.of(error)
        except Exception as error:  # noqa: BLE001 - the border between two processes
            answer.error = f"it failed ({type(error).__name__}); its log says more"
            log_event(_LOG, "worker.call.crashed", level=logging.ERROR, call=frame.name, exc_info=error)
        if frame.id and self._writer is not None:
            self._send(answer)
