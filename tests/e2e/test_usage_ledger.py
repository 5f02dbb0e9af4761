"""The usage ledger by a real gateway: every call in GET /usage, of two processes together, and after a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.databases import BACKENDS, database
from tests.support.house import ADMIN, CHAT, SECURITY, write_agent
from tests.support.scripted_answers import Answer, status
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

UPSTREAMS = """\
version: 1
upstreams:
  - {{name: first, base_url: {url}, models: [m], default_model: m}}
"""
ROOT = Path(__file__).parents[2]
PRICES = "version: 1\nmodels:\n  - {match: first/m, input: 1, output: 2, cache_write: 5}\n"
USED = {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cache_write_tokens": 40}}
COST = (60 + 40 * 5 + 10 * 2) / 1e6


@pytest.fixture(params=BACKENDS)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str], ScriptedUpstream]]:
    with ScriptedUpstream() as upstream, database(request.param, tmp_path) as url:
        (tmp_path / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
        (tmp_path / "upstreams.yaml").write_text(UPSTREAMS.format(url=upstream.base_url), encoding="utf-8")
        (tmp_path / "prices.yaml").write_text(PRICES, encoding="utf-8")
        (tmp_path / "security.yaml").write_text(SECURITY.replace("HIDE", "false"), encoding="utf-8")
        write_agent(tmp_path / "agents", "Helper", "Help.")
        env = {
            "GATEWAY_DATABASE_URL": url,
            "GATEWAY_PRICES_CONFIG": str(tmp_path / "prices.yaml"),
            "GATEWAY_USAGE_FLUSH_S": "0.05",
        }
        yield tmp_path, env, upstream


def ask(gateway: Gateway, model: str, *, key: str = CHAT, streamed: bool = False) -> int:
    body = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": "Hello"}]}
    return gateway.post("/v1/chat/completions", body, key=key).status


def usage(gateway: Gateway, query: str = "", **options: Any) -> list[dict[str, Any]]:
    answer = gateway.get(f"/usage?{query}", **options)
    assert answer.status == 200, answer.body
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_calls_of_two_processes_stand_in_one_ledger(home: tuple[Path, dict[str, str], ScriptedUpstream]) -> None:
    folder, env, upstream = home
    with ExitStack() as stack:
        one, two = (stack.enter_context(running_gateway(folder, env=env, key=ADMIN)) for _ in range(2))
        upstream.enqueue(*(Answer(text="Hi.", usage=USED) for _ in range(4)), *(status(500) for _ in range(5)))
        assert ask(one, "first/m") == 200
        assert ask(two, "first/m", streamed=True) == 200
        assert ask(two, "first/m", key=ADMIN) == 200
        assert ask(one, "default/helper") == 200
        assert ask(one, "first/m") >= 500

        def complete() -> list[dict[str, Any]]:
            found = usage(one, "group_by=key,model")
            assert sum(row["requests"] for row in found) == 5
            return found

        by_both = {(row["key"], row["model"]): row for row in wait_for(complete, what="both have written")}
        assert by_both.keys() == {("chat", "first/m"), ("admin", "first/m"), ("chat", "default/helper")}
        raw = by_both["chat", "first/m"]
        assert (raw["requests"], raw["failures"], raw["model_calls"]) == (3, 1, 2)
        assert (raw["input_tokens"], raw["output_tokens"], raw["cache_write_tokens"]) == (200, 20, 80)
        assert float(raw["cost_usd"]) == pytest.approx(2 * COST)
        agent = by_both["chat", "default/helper"]
        assert (agent["requests"], agent["model_calls"], float(agent["cost_usd"])) == (1, 1, pytest.approx(COST))
        assert [row["agent"] for row in usage(one, "group_by=agent")] == ["default/helper", None]
        assert usage(two, "group_by=day")[0]["requests"] == 5
        assert usage(two, "to=2020-01-01", key=ADMIN)[0]["requests"] == 0
        # A key that is no admin's sees its own, whatever it asks for.
        assert [row["key"] for row in usage(one, "group_by=key", key=CHAT)] == ["chat"]
        assert one.get("/usage?key=admin", key=CHAT).status == 403
        first = one.get("/usage?group_by=key,model&limit=2").json()
        assert (len(first["data"]), first["has_more"], first["next_offset"]) == (2, True, 2)
        assert len(usage(one, f"group_by=key,model&limit=2&offset={first['next_offset']}")) == 1
        # Single rows: four relayed calls, a run of an agent and its call; the latest first.
        rows = usage(one, "group_by=none")
        assert [row["at"] for row in rows] == sorted((row["at"] for row in rows), reverse=True)
        assert (sum(row["requests"] for row in rows), sum(row["model_calls"] for row in rows)) == (5, 4)
        (failed,) = (row for row in rows if row["error_code"] is not None)
        assert (failed["status"], failed["model"], failed["cost_usd"]) == ("failure", "first/m", None)
        mine = usage(one, "group_by=none&model=first/m&limit=1&offset=1", key=CHAT)
        assert [(row["key"], row["status"], row["upstream_model"]) for row in mine] == [("chat", "success", "m")]
        assert float(mine[0]["cost_usd"]) == pytest.approx(COST)
        assert mine[0]["run_id"].count("-") == 4 and mine[0]["request_id"]
        assert usage(one, "end_user=nobody%00")[0]["requests"] == 0, "what no column holds is looked for all the same"
        table = in_terminal(env, "--by", "key,model", "--only", "key=chat").splitlines()
        assert table[0].split()[:3] == ["KEY", "MODEL", "REQUESTS"]
        assert [line.split()[:3] for line in table[1:3]] == [["chat", "default/helper", "1"], ["chat", "first/m", "3"]]
        upstream.clear()
        upstream.enqueue(Answer(text="Hi.", usage=USED))
        talk = [{"role": "user", "content": "Hello"}]
        hostile = {"model": "first/m", "user": "\x1b[31mann\x07\nfake  9  9", "messages": talk}
        assert one.post("/v1/chat/completions", hostile).status == 200
        wait_for(lambda: len(usage(one, "group_by=end_user")) == 2, what="it is written")
        table = in_terminal(env, "--by", "end_user").splitlines()
        assert len(table) == 3 and "\ufffd[31mann\ufffd\ufffdfake  9  9" in "".join(table), "no name steers a terminal"
        printed = json.loads(in_terminal(env, "--by", "day", "--json"))
        assert printed["data"] == usage(one, "group_by=day")
        assert in_terminal(env, "--to", "2020-01-02", "--from", "2020-01-01").startswith("Nothing was used")
        assert "--by takes" in in_terminal(env, "--by", "colour", status=2)


def in_terminal(env: dict[str, str], *arguments: str, status: int = 0) -> str:
    """What `gateway usage` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway_cli", "usage", *arguments],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout or done.stderr


def test_what_was_written_survives_a_kill(home: tuple[Path, dict[str, str], ScriptedUpstream]) -> None:
    folder, env, upstream = home
    upstream.enqueue(Answer(text="Hi.", usage=USED))
    with running_gateway(folder, env=env, key=ADMIN) as gateway:
        assert ask(gateway, "first/m") == 200
        written = 'agent_gateway_usage_rows_total{outcome="written"} 1'
        wait_for(lambda: written in gateway.get("/metrics/prometheus").body.decode(), what="the row is written")
        os.kill(gateway.process.pid, signal.SIGKILL)
        gateway.process.wait(60)
    with running_gateway(folder, env=env, key=ADMIN) as gateway:
        assert usage(gateway)[0]["requests"] == 1


def test_a_store_that_is_down_costs_no_call_and_is_said_where_it_is_needed(tmp_path: Path) -> None:
    with ScriptedUpstream() as upstream:
        (tmp_path / "upstreams.yaml").write_text(UPSTREAMS.format(url=upstream.base_url), encoding="utf-8")
        (tmp_path / "security.yaml").write_text(SECURITY.replace("HIDE", "false"), encoding="utf-8")
        env = {"GATEWAY_DATABASE_URL": "postgresql://127.0.0.1:9/none", "GATEWAY_USAGE_FLUSH_S": "0.05"}
        with running_gateway(tmp_path, env=env, key=ADMIN) as gateway:
            for _ in range(3):
                upstream.enqueue(Answer(text="Hi.", usage=USED))
                assert ask(gateway, "first/m") == 200
            answer = gateway.get("/usage")
            assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"] == "1"
            ready = gateway.get("/readyz")
            assert (ready.status, ready.json()["components"]["store"]) == (200, "unavailable")
            gateway.logged("store.open.failed")
            assert len(gateway.log_events("store.open.failed")) == 1


@pytest.mark.parametrize(
    "query", ["group_by=secret", "group_by=key,key", "limit=0", "limit=x", "offset=-1", "from=yesterday", "colour=red"]
)
def test_a_question_that_makes_no_sense_is_refused(gateway: Gateway, query: str) -> None:
    answer = gateway.get(f"/usage?{query}")
    assert answer.status == 400
    assert answer.error["message"]
