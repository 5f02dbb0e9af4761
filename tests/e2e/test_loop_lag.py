"""Code that holds up the event loop is measured, and named in the log."""

from __future__ import annotations

from tests.e2e.conftest import GatewayFactory
from tests.support.house import CHAT, write_agent

TOOL = """\
import time

from agents import function_tool


@function_tool
async def ponder(question: str) -> str:
    time.sleep(1.2)
    return "done"
"""


def test_a_tool_that_blocks_the_loop_is_named(start: GatewayFactory) -> None:
    gateway = start(prepare=lambda home: write_agent(home / "agents", "Slow", "Slow.", extra=TOOL, tools="ponder"))
    for number, stream in enumerate((False, True)):
        messages = [{"role": "user", "content": 'call ponder {"question":"x"} ;; say x'}]
        body = {"model": "default/slow", "messages": messages, "stream": stream}
        headers = {"x-request-id": f"slow-{number}"}
        assert gateway.post("/v1/chat/completions", body, key=CHAT, headers=headers).status == 200
    for number, line in enumerate(gateway.logged("loop.blocked", count=2, where=lambda line: line.get("tool_name"))):
        assert (line["tool_name"], line["agent_id"], line["caused_by"]) == ("ponder", "default/slow", f"slow-{number}")
        assert str(line["module_path"]).endswith("Slow/agent.py") and line["function"] == "ponder"
        assert line["line"] == 10
    text = gateway.get("/metrics/prometheus").body.decode()
    buckets = {
        float(line.split('le="')[1].split('"')[0]): float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("agent_gateway_event_loop_lag_seconds_bucket")
    }
    assert buckets[30.0] - buckets[0.5] >= 2


def test_a_loop_that_is_free_is_not_blamed(start: GatewayFactory) -> None:
    extra = TOOL.replace("async def", "def")
    gateway = start(prepare=lambda home: write_agent(home / "agents", "Fair", "Fair.", extra=extra, tools="ponder"))
    messages = [{"role": "user", "content": 'call ponder {"question":"x"} ;; say x'}]
    body = {"model": "default/fair", "messages": messages}
    assert gateway.post("/v1/chat/completions", body, key=CHAT).status == 200
    assert not [line for line in gateway.log_events("loop.blocked") if line.get("tool_name")]
