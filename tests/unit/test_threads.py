"""The loop's threads: many, bounded, and never in the way of the exit."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from api.threads import DaemonThreadPool
from tests.support.waiting import wait_for

SOURCES = Path(__file__).parents[2] / "src"


def test_results_exceptions_and_reuse_of_threads() -> None:
    pool = DaemonThreadPool(4)
    assert pool.submit(pow, 2, 3).result(5) == 8
    assert isinstance(pool.submit(int, "x").exception(5), ValueError)
    assert [pool.submit(threading.get_ident).result(5) for _ in range(3)]
    assert list(pool.map(abs, [-1, -2])) == [1, 2]
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(abs, 1)


def test_no_more_threads_than_the_limit_and_queued_calls_still_run() -> None:
    pool, gate, names = DaemonThreadPool(3), threading.Event(), set[str]()

    def work() -> None:
        names.add(threading.current_thread().name)
        gate.wait(60)

    futures = [pool.submit(work) for _ in range(9)]
    wait_for(lambda: len(names) == 3, what="each thread has a call")
    gate.set()
    for future in futures:
        future.result(5)
    assert len(names) == 3
    pool.shutdown()


def test_it_is_a_default_executor_and_does_not_keep_what_it_called_with() -> None:
    class Thing:
        pass

    async def run() -> weakref.ref[Thing]:
        asyncio.get_running_loop().set_default_executor(DaemonThreadPool(2))
        thing = Thing()
        shown = weakref.ref(thing)
        await asyncio.to_thread(id, thing)
        return shown

    kept = asyncio.run(run())
    gc.collect()
    assert kept() is None


def test_closing_does_not_wait_for_ever_and_neither_does_the_interpreter() -> None:
    code = (
        "import asyncio, time\n"
        "from api.threads import DaemonThreadPool\n"
        "async def main():\n"
        "    asyncio.get_running_loop().set_default_executor(DaemonThreadPool(2, patience_s=0.2))\n"
        "    asyncio.ensure_future(asyncio.to_thread(time.sleep, 600))\n"
        "    await asyncio.sleep(0)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=SOURCES)


def test_queued_calls_are_cancelled_when_asked() -> None:
    pool, gate = DaemonThreadPool(1, patience_s=5), threading.Event()
    first, second = pool.submit(gate.wait, 5), pool.submit(abs, 1)
    while not first.running():
        time.sleep(0.001)
    pool.shutdown(wait=False, cancel_futures=True)
    gate.set()
    assert first.result(60) is True
    assert second.cancelled()
