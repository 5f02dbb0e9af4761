"""The threads that plain functions of authors (tools, guardrails, instructions) run in, beside the event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

THREADS = 64
"""The loop's own default is six on two cores: as many slow tools would keep all others waiting."""

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreadPool(ThreadPoolExecutor):
    """A bounded pool whose threads never hold up the exit: a tool that hangs for ever ends with the process.

    It is a `ThreadPoolExecutor` in name, because the event loop accepts no other default executor; nothing of that
    class but its type is used. ``patience_s`` is how long closing waits for calls under way.
    """

    def __init__(self, max_workers: int = THREADS, *, patience_s: float = 2.0) -> None:
        super().__init__(max_workers)
        self._limit = max_workers
        self._patience_s = patience_s
        self._jobs: SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = SimpleQueue()
        self._free = threading.Semaphore(0)
        self._workers: list[threading.Thread] = []
        self._guard = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `concurrent.futures.Executor.submit`."""
        future: Future[T] = Future()
        with self._guard:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._jobs.put((future, partial(fn, *args, **kwargs)))  # type: ignore[arg-type]
            if not self._free.acquire(blocking=False) and len(self._workers) < self._limit:
                name = f"gateway-{len(self._workers)}"
                worker = threading.Thread(target=self._work, name=name, daemon=True)
                self._workers.append(worker)
                worker.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; wait for calls under way, but not for ever."""
        with self._guard:
            self._closed = True
            if cancel_futures:
                self._cancel_queued()
            self._jobs.put(None)
        if wait:
            deadline = time.monotonic() + self._patience_s
            for worker in self._workers:
                worker.join(max(0.0, deadline - time.monotonic()))

    def _cancel_queued(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None:
                job[0].cancel()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except StopIteration as error:  # a future of asyncio refuses it, and whoever waits would wait for ever
                    future.set_exception(_as_runtime_error(error))
                except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # Nothing of a finished call is kept while this waits: it may belong to a released generation.
            del job, future, call
            self._free.release()
        self._jobs.put(None)


def _as_runtime_error(error: StopIteration) -> RuntimeError:
    """Return what Python makes of a `StopIteration` that leaves a coroutine."""
    raised = RuntimeError("function raised StopIteration")
    raised.__cause__ = error
    return raised
