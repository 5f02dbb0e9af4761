"""One MCP session: concurrent calls, servers that die, hang, lie or flood, and nothing left of them at the end."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ToolError, ToolFailed, ToolResultTooLarge, ToolTimedOut, ToolUnavailable
from gateway.tools.mcp.session import McpSession, SessionLimits
from gateway.tools.mcp.stdio import StdioTarget, stdio_streams
from tests.support.mcp_servers import RAW_SERVER, alive, environment, quickest, raw_command, read_pids, until

LIMITS = SessionLimits(connect_s=10)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def target(pids: Path, mode: str = "", **env: str) -> StdioTarget:
    return StdioTarget(raw_command(pids), {"MODE": mode, **env})


@asynccontextmanager
async def session(
    tmp_path: Path, mode: str = "", *, limits: SessionLimits = LIMITS, message_limit: int = 1_000_000, **env: str
) -> AsyncIterator[McpSession]:
    made = McpSession(
        "raw", lambda: stdio_streams(target(tmp_path / "pids", mode, **env), message_limit=message_limit), limits
    )
    try:
        yield made
    finally:
        await made.aclose()
    for pid in pids(tmp_path):
        assert not alive(pid), f"{pid} is left"


def pids(tmp_path: Path) -> list[int]:
    return read_pids(tmp_path / "pids")


async def call(made: McpSession, tool: str = "echo", timeout_s: float = 60, **more: Any) -> str:
    arguments = more.pop("arguments", {})
    result = await made.call(tool, arguments, timeout_s=timeout_s, **more)
    return str(result.content[0].text)  # type: ignore[union-attr]


async def test_calls_share_one_session_at_once(tmp_path: Path) -> None:
    async with session(tmp_path) as made:
        await call(made)
        seconds, answers = await quickest(
            lambda: asyncio.gather(*(call(made, "slow", arguments={"n": n}) for n in range(20)))
        )
        assert [f'"n": {n}' in answer for n, answer in enumerate(answers)] == [True] * 20
        assert seconds < 2, f"20 calls of 0.2 s took {seconds:.2f} s; one after another they take 4"
    assert len(pids(tmp_path)) == 1


async def test_the_tools_are_listed_when_it_connects(tmp_path: Path) -> None:
    async with session(tmp_path) as made:
        listing = await made.wait_listed()
        assert [tool.name for tool in listing.tools] == ["echo", "slow"]


async def test_progress_is_passed_on(tmp_path: Path) -> None:
    told: list[Any] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append((done, total, message))

    async with session(tmp_path) as made:
        await call(made, "slow", progress=progress)
    assert told == [(1, 2, "half")]


async def test_a_server_killed_between_two_calls_is_started_again(tmp_path: Path) -> None:
    async with session(tmp_path) as made:
        first = await call(made)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        await until(lambda: not made.connected, "the session saw the end")
        assert await call(made) != first
    assert len(pids(tmp_path)) == 2


async def test_a_server_killed_during_a_call_fails_it_once_and_serves_the_next(tmp_path: Path) -> None:
    async with session(tmp_path) as made:
        await call(made)
        waiting = asyncio.create_task(call(made, "slow", arguments={"seconds": 30}))
        await asyncio.sleep(0.05)
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        with pytest.raises(ToolFailed, match="ended before the answer"):
            await waiting
        assert "pid" in await call(made)


@pytest.mark.parametrize("repeatable", [False, True])
async def test_only_a_call_that_may_repeat_is_repeated(tmp_path: Path, repeatable: bool) -> None:
    async with session(tmp_path, "die_at_call") as made:
        await call(made)
        with pytest.raises(ToolFailed):
            await call(made, arguments={"die": True}, repeatable=repeatable)
        assert len(pids(tmp_path)) == (2 if repeatable else 1)


async def test_cancelling_a_call_cancels_it_at_the_server_and_spares_the_others(tmp_path: Path) -> None:
    cancelled = tmp_path / "cancelled"
    async with session(tmp_path, CANCELLED=str(cancelled)) as made:
        await call(made)
        other = asyncio.create_task(call(made, "slow", arguments={"seconds": 0.3}))
        waiting = asyncio.create_task(call(made, "slow", arguments={"seconds": 30}))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert "pid" in await other
        await until(cancelled.exists, "the server was told")
        assert made.connected


async def test_a_server_that_hangs_at_its_start_is_given_up_in_time(tmp_path: Path) -> None:
    limits = replace(LIMITS, connect_s=0.4)
    async with session(tmp_path, "hang_at_init", limits=limits) as made:
        with pytest.raises(ToolTimedOut):
            await call(made, timeout_s=0.3)
        await until(lambda: made.failure, "the reason")
        assert made.failure == "it did not answer within 0.4 s"


async def test_a_server_that_hangs_at_calls_is_replaced(tmp_path: Path) -> None:
    async with session(tmp_path, "hang_at_call") as made:
        await made.wait_listed()
        for _ in range(3):
            with pytest.raises(ToolTimedOut):
                await call(made, timeout_s=0.1)
        await until(lambda: len(pids(tmp_path)) == 2, "a second process")


async def test_answers_with_wrong_ids_answer_nothing(tmp_path: Path) -> None:
    async with session(tmp_path, "wrong_ids") as made:
        with pytest.raises(ToolTimedOut):
            await call(made, timeout_s=0.5)


async def test_garbage_fails_one_call_and_shows_nothing_of_it(tmp_path: Path) -> None:
    async with session(tmp_path, "garbage") as made:
        with pytest.raises(ToolFailed) as caught:
            await call(made)
        assert "not a list" not in caught.value.message
        assert made.connected


async def test_a_hundred_megabytes_are_not_held(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with session(tmp_path, "huge") as made:
        with pytest.raises(ToolResultTooLarge):
            await call(made)
        assert made.connected, "the other calls of the session go on"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 24, f"{grown:.0f} MB"


async def test_a_large_answer_with_its_id_at_the_end_fails_its_own_call(tmp_path: Path) -> None:
    async with session(tmp_path, "huge_id_last") as made:
        with pytest.raises(ToolResultTooLarge):
            await call(made)
        assert made.connected


async def test_twenty_thousand_tools_are_refused_without_reading_them(tmp_path: Path) -> None:
    async with session(tmp_path, "many_tools") as made:
        with pytest.raises(ToolError):
            await call(made)
        await until(lambda: made.failure, "the reason")
        assert made.failure == "its answer is larger than allowed"


async def test_more_tools_than_allowed_are_cut_off(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_tools=50)
    async with session(tmp_path, "many_tools", limits=limits, message_limit=20_000_000) as made:
        listing = await made.wait_listed()
        assert (len(listing.tools), listing.overflowed) == (50, True)


async def test_a_server_that_says_changed_after_each_list_is_listed_with_pauses(tmp_path: Path) -> None:
    listed = tmp_path / "listed"
    limits = replace(LIMITS, relist_pause_s=0.3)
    async with session(tmp_path, "restless", limits=limits, LISTED=str(listed)) as made:
        await made.wait_listed()
        await until(lambda: len(listed.read_text().split()) >= 4, "it is listed again and again")
    moments = [float(line) for line in listed.read_text().split()]
    assert all(after - before > 0.29 for before, after in itertools.pairwise(moments))


async def test_the_circuit_opens_after_failures_and_closes_again(tmp_path: Path) -> None:
    script = tmp_path / "server"
    made = McpSession("raw", lambda: stdio_streams(StdioTarget((str(script),)), message_limit=1_000), LIMITS)
    try:
        with pytest.raises(ToolUnavailable) as caught:
            await call(made)
        assert caught.value.code == "mcp_server_unreachable"
        with pytest.raises(ToolUnavailable):
            await call(made)
        script.write_text(f"#!/bin/sh\nexec {sys.executable} -S -E {RAW_SERVER} {tmp_path / 'pids'}\n")
        script.chmod(0o755)
        await until(lambda: made.connected, "the circuit closed")
        assert "pid" in await call(made)
    finally:
        await made.aclose()


async def test_an_idle_session_is_closed_and_made_again_for_the_next_call(tmp_path: Path) -> None:
    async with session(tmp_path, limits=replace(LIMITS, idle_s=0.1)) as made:
        await call(made)
        await until(lambda: not any(map(alive, pids(tmp_path))), "the process ended")
        assert "pid" in await call(made)


async def test_children_that_left_the_group_end_with_the_server(tmp_path: Path) -> None:
    async with session(tmp_path, CHILDREN="1") as made:
        await call(made)
        assert len(pids(tmp_path)) == 3 and all(map(alive, pids(tmp_path)))


async def test_children_of_a_server_that_was_killed_end_too(tmp_path: Path) -> None:
    async with session(tmp_path, CHILDREN="1") as made:
        await call(made)
        old = pids(tmp_path)
        os.kill(old[0], signal.SIGKILL)
        await until(lambda: not any(map(alive, old)), "its children ended")
        assert "pid" in await call(made)


async def test_a_server_that_does_not_want_to_end_is_ended(tmp_path: Path) -> None:
    async with session(tmp_path, "stay") as made:
        await call(made)


async def test_a_hundred_reloads_leave_no_process(tmp_path: Path) -> None:
    for _ in range(100):
        async with session(tmp_path) as made:
            await made.wait_listed()
    assert len(pids(tmp_path)) == 100
    assert not any(map(alive, pids(tmp_path)))


async def test_closing_while_it_connects_leaves_nothing(tmp_path: Path) -> None:
    async with session(tmp_path) as made:
        made.start()
        await asyncio.sleep(0)


async def test_a_server_sees_nothing_of_the_gateways_environment(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GATEWAY_API_KEY", "gw-secret")
    async with session(tmp_path) as made:
        await call(made)
        assert b"gw-secret" not in environment(pids(tmp_path)[0])
