"""SIGTERM: streams that end in time are whole, the others are told, and nothing is left running."""

from __future__ import annotations

import http.client
import json
import signal
from contextlib import closing
from pathlib import Path

from tests.support.scripted_upstream import ScriptedUpstream, fault
from tests.support.server import descendants, running_gateway
from tests.support.waiting import wait_for

ECHO = 'from agents import Agent\nagent = Agent(name="Echo")\n'
STUCK = """import time
from agents import Agent, function_tool

@function_tool
def wait() -> str:
    \"\"\"Wait.\"\"\"
    time.sleep(600)
    return "done"

agent = Agent(name="Stuck", tools=[wait])
"""


def test_sigterm_tells_the_streams_that_do_not_end_and_goes(tmp_path: Path) -> None:
    for name, text in {"Echo": ECHO, "Stuck": STUCK}.items():
        (tmp_path / "agents" / name).mkdir(parents=True)
        (tmp_path / "agents" / name / "agent.py").write_text(text, encoding="utf-8")
    with ScriptedUpstream() as upstream:
        (tmp_path / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
        (tmp_path / "upstreams.yaml").write_text(
            "version: 1\nupstreams:\n"
            f"  - {{name: up, provider: openai-compatible, base_url: '{upstream.base_url}',\n"
            "     models: [m], default_model: m}\n",
            encoding="utf-8",
        )
        with (
            running_gateway(tmp_path, env={"GATEWAY_SHUTDOWN_DRAIN_S": "1"}, key="dev-secret") as gateway,
            closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)) as streaming,
            closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)) as stuck,
        ):
            family = descendants(gateway.process.pid)
            upstream.enqueue(fault("hang_part_way"))
            _ask(streaming, "default/echo", stream=True)
            answer = streaming.getresponse()
            assert answer.status == 200 and answer.readline()
            _ask(stuck, "default/stuck", stream=False)
            wait_for(lambda: len(upstream.requests) >= 2, what="the stuck agent asks its model")
            gateway.process.send_signal(signal.SIGTERM)
            rest = answer.read()
            refused = stuck.getresponse()
            assert json.loads(refused.read())["error"]["code"] == "shutting_down"
            assert (refused.status, refused.getheader("retry-after")) == (503, "1")
            assert json.loads(rest.rstrip().rpartition(b"data: ")[2])["error"]["code"] == "shutting_down"
            assert b"[DONE]" not in rest
            gateway.process.wait(60)
        wait_for(lambda: not any(map(_lives, family)), what="the gateway's children are gone")


def _ask(connection: http.client.HTTPConnection, model: str, *, stream: bool) -> None:
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "go"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"authorization": "Bearer dev-secret"})


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()
