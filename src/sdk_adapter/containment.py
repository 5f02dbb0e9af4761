"""An author's `sys.exit()` ends the author's run, not the gateway. Needs no SDK.

In a task `SystemExit` and `KeyboardInterrupt` go past whoever awaits it, straight out of the event loop, and take every
run of the process with them. Tasks that are started inside a run, by the SDK or by author code, are therefore wrapped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from sdk_adapter.scope import belongs_to_a_run


class AuthorExit(Exception):
    """Author code raised what no ``except Exception`` catches; the cause is what it raised."""


@contextmanager
def exits_contained() -> Iterator[None]:
    """Turn such exceptions of the running loop's tasks into `AuthorExit`, as far as they belong to runs."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    make: Any = before or _make_task

    def factory(
        loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **options: Any
    ) -> asyncio.Future[Any]:
        if belongs_to_a_run(options.get("context")):
            work = _contained(work)
        made: asyncio.Future[Any] = make(loop, work, **options)
        return made

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(before)


def is_stopped(error: BaseException) -> bool:
    """Return whether ``error`` says that the current task shall end, and is nothing that its own code raised."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, GeneratorExit)


def raise_if_cancelled(task: asyncio.Task[Any] | None) -> None:
    """Raise `AuthorExit` for a task that has ended as cancelled."""
    if task is not None and task.cancelled():
        try:
            task.result()
        except asyncio.CancelledError as error:
            raise AuthorExit("CancelledError in a task of a run") from error


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(work, loop=loop, **options)


async def _contained(work: Any) -> Any:
    try:
        return await work
    except (Exception, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        raise AuthorExit(f"{type(error).__name__} in a task of a run") from error
