"""Four processes with 200 calls at a time each share one budget: it is used, and never passed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from gateway.config import Settings
from gateway.store.store import database_url
from tests.support.databases import database
from tests.unit.test_limit_stores import REDIS_URL

ROOT = Path(__file__).parents[2]
BUDGET_USD = 0.8
WORST = 2_000_000
"""Nanodollars that a call may cost: a four-hundredth of the budget, of which 800 callers want their part at once."""


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
def test_four_processes_never_spend_more_than_the_budget(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if kind == "redis":
            url = REDIS_URL
            try:
                redis.Redis.from_url(url).ping()
            except redis.RedisError:
                if os.environ.get("CI"):
                    raise
                pytest.skip("no Redis at GATEWAY_TEST_REDIS_URL")
        else:
            given = stack.enter_context(database(kind, tmp_path))
            url = database_url(Settings.from_env({"GATEWAY_DATABASE_URL": given}))
        name = f"budget-{uuid.uuid4().hex[:16]}"
        if kind == "redis":
            stack.callback(_forget, name)
        processes = []
        for number in range(4):
            log = stack.enter_context((tmp_path / f"worker-{number}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.budget_worker", kind, url, name, str(BUDGET_USD), str(WORST)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", _logs(tmp_path)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outcomes = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    spent = sum(nanodollars for nanodollars, _ in outcomes) / 1e9
    assert sum(calls > 0 for _, calls in outcomes) >= 2, "no process had it all to itself"
    assert spent <= BUDGET_USD, f"{spent} of {BUDGET_USD} USD, by {outcomes}"
    assert spent >= BUDGET_USD * 0.9, f"{spent} of {BUDGET_USD} USD, by {outcomes}"
    assert "unreachable" not in _logs(tmp_path)


def _forget(name: str) -> None:
    client = redis.Redis.from_url(REDIS_URL)
    for key in client.scan_iter(f"gateway:{{limits}}:*{name}*"):
        client.delete(key)
    client.close()


def _logs(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("worker-*.log"))
