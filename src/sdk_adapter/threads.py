"""A thread of its own for one piece of work that may take long, or for ever. Needs no SDK."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(work: Callable[[], T], *, name: str = "drop-in import") -> T:
    """Run ``work`` in a daemon thread of its own and await it: a thread that hangs holds up nobody, not even the exit.

    A `BaseException` raised by ``work`` reaches the caller as it is, except the two that would end the loop.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def target() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = context.run(work)
        except (SystemExit, KeyboardInterrupt, StopIteration) as raised:
            error = RuntimeError(f"{type(raised).__name__} in a worker thread")
            error.__cause__ = raised
        except BaseException as raised:  # noqa: BLE001 - whatever it is, it belongs to the caller
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=target, name=name, daemon=True).start()
    return await done
