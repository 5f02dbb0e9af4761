"""The pre-flight's process is started once, however many checks begin together."""

from __future__ import annotations

import asyncio

import pytest

from sdk_adapter.preflight import Preflight


@pytest.mark.skipif(not Preflight(fork=None)._fork, reason="without fork every check has a process of its own")
def test_checks_that_begin_together_share_one_server() -> None:
    async def run() -> set[int]:
        async with Preflight() as preflight:
            servers = await asyncio.gather(*(preflight._running() for _ in range(5)), preflight.start())
            return {server.pid for server in servers if server is not None}

    assert len(asyncio.run(run())) == 1
