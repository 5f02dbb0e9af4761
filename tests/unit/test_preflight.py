"""The pre-flight: what would hurt the gateway hurts a child of one fork server, and is told with its cause."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gateway.registry.policy import ModulePolicy
from sdk_adapter.preflight import CheckReport, Preflight
from tests.support.loading import dropin_at, write, write_agent
from tests.support.waiting import wait_for

T = TypeVar("T")
NAMES = ("agent", "build_agent")
Run = Callable[[Callable[[Preflight], Awaitable[Any]]], Any]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the fork server needs fork")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as opened:
        yield opened


@pytest.fixture(scope="module")
def with_preflight(runner: asyncio.Runner) -> Iterator[Run]:
    """Runs a test's work with the pre-flight that all tests share: each start of it loads the SDK."""
    preflight = Preflight(places=2)

    async def call(work: Callable[[Preflight], Awaitable[Any]]) -> Any:
        return await work(preflight)

    yield lambda work: runner.run(call(work))
    runner.run(preflight.aclose())


def with_own_preflight(work: Callable[[Preflight], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        async with Preflight(**options) as preflight:
            return await work(preflight)

    return asyncio.run(run())


async def check(preflight: Preflight, root: Path, folder: str = "Some", *, timeout_s: float = 60.0) -> CheckReport:
    return await preflight.check(dropin_at(root, folder), names=NAMES, policy=ModulePolicy(), timeout_s=timeout_s)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1][0]
    except OSError:
        return False
    return state != "Z"


HOSTILE = {
    "Exit": ("import os\nprint('last words', flush=True)\nos._exit(7)\n", "import_exit", "exit code 7"),
    "Crash": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "import_exit", "SIGSEGV"),
    "Loop": ("while True:\n    pass\n", "import_timeout", "2 s"),
    "Deaf": (
        "import os, signal, time\nfor n in range(1, 30):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(60)\n",
        "import_timeout",
        "2 s",
    ),
    "Threads": (
        "import threading, time\nfor _ in range(50):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=False).start()\n"
        "from agents import Agent\nagent = Agent(name='A')\n",
        "threads_left",
        "50 running threads",
    ),
    "Loud": ("import sys\nsys.stdout.write('x' * 5_000_000)\n1 / 0\n", "import_error", "ZeroDivisionError"),
    "Exits": ("import sys\nsys.exit('bye')\n", "import_exit", "sys.exit('bye')"),
    "Grabs": (
        "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass\n",
        "import_exit",
        "",
    ),
}


def test_hostile_imports_are_contained_and_explained(tmp_path: Path, with_preflight: Run) -> None:
    for folder, (source, _, _) in HOSTILE.items():
        write(tmp_path, f"{folder}/agent.py", source)
    write_agent(tmp_path, "Good")

    async def work(preflight: Preflight) -> dict[str, CheckReport]:
        await check(preflight, tmp_path, "Good")  # the server is up
        limits = {folder: 2 if code == "import_timeout" else 60 for folder, (_, code, _) in HOSTILE.items()}
        limits["Good"] = 60
        checks = {folder: check(preflight, tmp_path, folder, timeout_s=limit) for folder, limit in limits.items()}
        return dict(zip(checks, await asyncio.gather(*checks.values()), strict=True))

    reports = with_preflight(work)
    assert reports.pop("Good").diagnostics == ()
    for folder, report in reports.items():
        _, code, words = HOSTILE[folder]
        assert len(report.diagnostics) == 1, (folder, report)
        [problem] = report.diagnostics
        assert (problem.code, problem.kind, problem.file) == (code, "import", f"{folder}/agent.py"), report
        assert words in problem.message
        assert problem.fix
        assert len(report.output) <= 4096
    assert reports["Exit"].diagnostics[0].cause == "last words"


def test_nothing_that_an_import_started_is_left(tmp_path: Path, with_preflight: Run) -> None:
    source = """
import os, subprocess, sys, time
plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
detached = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
if (forked := os.fork()) == 0:
    os.setsid()
    time.sleep(60)
open(os.environ["TEST_PIDS"], "w").write(f"{os.getpid()} {plain.pid} {detached.pid} {forked}")
from agents import Agent
agent = Agent(name="A")
"""
    pids_file = tmp_path / "pids"
    os.environ["TEST_PIDS"] = str(pids_file)
    write(tmp_path, "Some/agent.py", source)
    write(tmp_path, "Hangs/agent.py", source + "time.sleep(60)\n")

    async def work(preflight: Preflight) -> list[int]:
        pids: list[int] = []
        for folder, timeout_s in (("Some", 20), ("Hangs", 2)):
            await check(preflight, tmp_path, folder, timeout_s=timeout_s)
            pids += map(int, pids_file.read_text(encoding="ascii").split())
        return pids

    async def checked(preflight: Preflight) -> None:
        pids = await work(preflight)
        await asyncio.to_thread(
            wait_for, lambda: not any(map(is_running, pids)), what="everything it started has ended"
        )

    with_preflight(checked)


def test_a_hanging_import_does_not_delay_the_others(tmp_path: Path, with_preflight: Run) -> None:
    for index in range(4):
        write(tmp_path, f"Hangs{index}/agent.py", "import time\ntime.sleep(60)\n")
    write_agent(tmp_path, "Good")

    async def work(preflight: Preflight) -> float:
        await check(preflight, tmp_path, "Good")
        hanging = [asyncio.create_task(check(preflight, tmp_path, f"Hangs{i}", timeout_s=60)) for i in range(4)]
        started = time.perf_counter()
        for _ in range(3):
            await check(preflight, tmp_path, "Good")
        seconds = time.perf_counter() - started
        assert not any(task.done() for task in hanging)
        for task in hanging:
            task.cancel()
        await asyncio.wait(hanging)
        return seconds

    assert with_preflight(work) < 50


def test_a_cancelled_check_ends_its_child(tmp_path: Path, with_preflight: Run) -> None:
    pid_file = tmp_path / "pid"
    os.environ["TEST_PIDS"] = str(pid_file)
    source = "import os, time\nopen(os.environ['TEST_PIDS'], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    write(tmp_path, "Some/agent.py", source)

    async def work(preflight: Preflight) -> None:
        task = asyncio.create_task(check(preflight, tmp_path, timeout_s=60))
        pid = int(await asyncio.to_thread(wait_for, lambda: pid_file.exists() and pid_file.read_text(encoding="ascii")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for, lambda: not is_running(pid))

    with_preflight(work)


def test_the_server_stops_when_idle_and_comes_back(tmp_path: Path) -> None:
    write_agent(tmp_path, "Some")

    async def work(preflight: Preflight) -> None:
        await check(preflight, tmp_path)
        first = preflight.server_pid
        assert first is not None
        await asyncio.to_thread(wait_for, lambda: preflight.server_pid is None and not is_running(first))
        assert (await check(preflight, tmp_path)).diagnostics == ()
        assert preflight.server_pid not in (None, first)

    with_own_preflight(work, idle_s=0.1)


def test_a_server_that_dies_is_replaced(tmp_path: Path, with_preflight: Run) -> None:
    write_agent(tmp_path, "Some")

    async def work(preflight: Preflight) -> None:
        await check(preflight, tmp_path)
        assert preflight.server_pid is not None
        os.kill(preflight.server_pid, signal.SIGKILL)
        assert (await check(preflight, tmp_path)).diagnostics == ()

    with_preflight(work)


def test_the_child_sees_the_servers_environment_and_data_files_are_noted(tmp_path: Path, with_preflight: Run) -> None:
    write(tmp_path, "Some/prompt.md", "text")
    write(tmp_path, "Some/log.txt", "")
    write(tmp_path, "Some/helper.py", "VALUE = 1\n")
    extra = """
import os, helper
from pathlib import Path
assert os.environ["LATE_VARIABLE"] == "set after the server started"
here = Path(__file__).parent
(here / "prompt.md").read_text()
(here / "log.txt").read_text()
(here / "log.txt").write_text("written")
"""
    write_agent(tmp_path, "Some", extra=extra)

    async def work(preflight: Preflight) -> CheckReport:
        await preflight.start()
        os.environ["LATE_VARIABLE"] = "set after the server started"
        return await check(preflight, tmp_path)

    report = with_preflight(work)
    assert report.diagnostics == ()
    assert {path.name for path in report.hashes} == {"agent.py", "helper.py", "prompt.md"}


def test_where_there_is_no_fork_a_process_is_spawned(tmp_path: Path) -> None:
    write_agent(tmp_path, "Good", extra="print('to nowhere')\n")
    write(tmp_path, "Bad/agent.py", "import sys\nsys.exit(4)\n")

    async def work(preflight: Preflight) -> tuple[CheckReport, CheckReport]:
        return await check(preflight, tmp_path, "Good"), await check(preflight, tmp_path, "Bad")

    good, bad = with_own_preflight(work, fork=False)
    assert good.diagnostics == () and good.files
    assert bad.diagnostics[0].code == "import_exit"
