"""AC-17: agents with MCP servers, over stdio and streamable HTTP; the server restarts between two calls."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

from tests.support.house import drop, write_agent
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, free_port, stop
from tests.support.waiting import wait_for

LIBRARY = '''\
import sys
from mcp.server.mcpserver import MCPServer

server = MCPServer("library")

@server.tool()
def find_book(title: str) -> str:
    """Find a book."""
    return f"{title} stands on shelf " + sys.argv[2]

server.run("streamable-http", port=int(sys.argv[1]))
'''


@contextmanager
def library(folder: Path, port: int, shelf: str) -> Iterator[None]:
    """Run the HTTP server of the fixture `McpHttp`."""
    script = folder / "library.py"
    script.write_text(LIBRARY, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), str(port), shelf],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _listens(port), what="the MCP server listens")
        yield
    finally:
        process.kill()
        stop(process)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


def ask(client: OpenAI, model: str, text: str) -> str:
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
    return answer.choices[0].message.content or ""


def test_http_server_is_used_and_its_restart_survived(
    start: Callable[..., Gateway],
    openai_client: Callable[..., OpenAI],
    upstream: ObedientUpstream,
    tmp_path: Path,
) -> None:
    port = free_port()
    with library(tmp_path, port, "one"):
        gateway = start(
            prepare=lambda home: drop("McpHttp", home / "agents"),
            env={"TEST_MCP_URL": f"http://127.0.0.1:{port}/mcp"},
        )
        client = openai_client(gateway)
        assert "Dune stands on shelf one" in ask(client, "default/mcphttp", 'call find_book {"title":"Dune"} ;; echo')
    with library(tmp_path, port, "two"):
        answer = ask(client, "default/mcphttp", 'call find_book {"title":"Emma"} ;; echo')
        assert "Emma stands on shelf two" in answer


def test_stdio_server_is_started_once_restarted_after_its_death_and_ends_with_its_generation(
    start: Callable[..., Gateway], openai_client: Callable[..., OpenAI], tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    gateway = start(prepare=lambda home: drop("McpStdio", home / "agents"), env={"TEST_MCP_PID_FILE": str(pids)})
    client = openai_client(gateway)
    question = 'call time_in {"city":"Lima"} ;; echo'
    first = ask(client, "default/mcpstdio", question)
    assert "In Lima it is noon" in first
    assert ask(client, "default/mcpstdio", question) == first, "one process serves the whole generation"

    (pid,) = {int(p) for p in pids.read_text(encoding="utf-8").split() if f"pid {p}" in first}
    os.kill(pid, signal.SIGKILL)
    second = ask(client, "default/mcpstdio", question)
    assert "In Lima it is noon" in second and second != first

    write_agent(gateway.agents, "McpStdio", "No server any more.")
    started = [int(p) for p in pids.read_text(encoding="utf-8").split()]
    wait_for(lambda: not any(map(_runs, started)), what="the old generation's server has ended")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_server_costs_one_agent_only(
    start: Callable[..., Gateway], openai_client: Callable[..., OpenAI]
) -> None:
    gateway = start(
        prepare=lambda home: [drop(name, home / "agents") for name in ("McpHttp", "WeatherAgent")],
        env={"TEST_MCP_URL": "http://127.0.0.1:9/mcp"},
    )
    client = openai_client(gateway)
    assert ask(client, "default/weatheragent", "say unharmed") == "unharmed"
    request = {"model": "default/mcphttp", "messages": [{"role": "user", "content": "say x"}]}
    answer = gateway.post("/v1/chat/completions", request)
    assert answer.status in (404, 500, 502, 503), answer.body
    assert "127.0.0.1:9" not in answer.body.decode()
