"""AC-7 over `gateway serve --workers`: a small limit is exact over all workers and replicas, whatever the store."""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.test_limits import ask, security, shared_store
from tests.e2e.test_workers import serve, serving, write_upstream
from tests.support.house import ADMIN
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import running_gateway

LIMIT = 10
EACH = 16
"""Calls by each thread and replica."""


@pytest.mark.parametrize(("kind", "replicas", "workers"), [("sqlite", 1, 4), ("redis", 1, 4), ("postgresql", 2, 2)])
def test_the_eleventh_request_is_refused_whichever_process_gets_it(
    kind: str, replicas: int, workers: int, tmp_path: Path
) -> None:
    key = f"ac7-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    with ExitStack() as stack:
        upstream = stack.enter_context(ScriptedUpstream())
        env = stack.enter_context(shared_store(kind, tmp_path)) | {"GATEWAY_SHUTDOWN_DRAIN_S": "2"}
        gateways = []
        for number in range(replicas):
            home = tmp_path / f"replica-{number}"
            home.mkdir()
            write_upstream(home, upstream, name="local")
            (home / "security.yaml").write_text(
                security(**{key: f"limits: {{requests_per_minute: {LIMIT}}}"}), encoding="utf-8"
            )
            gateways.append(stack.enter_context(running_gateway(home, env=env, key=ADMIN, command=serve(workers))))
        for gateway in gateways:
            serving(gateway, workers)
        with ThreadPoolExecutor(EACH) as pool:
            seen = Counter(pool.map(lambda n: ask(gateways[n % replicas], key).status, range(EACH * replicas)))
        assert seen == {200: LIMIT, 429: EACH * replicas - LIMIT}
        assert [ask(gateway, key).status for gateway in gateways for _ in range(workers)] == [429] * workers * replicas
