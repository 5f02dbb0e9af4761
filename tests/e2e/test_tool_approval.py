"""Tools of an MCP server that changed, and the command line that shows and accepts them, over two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mcp_servers import RAW_SERVER
from tests.support.server import ROOT, Gateway, running_gateway
from tests.support.waiting import wait_for

KEY = "sk-test-approval-aaaaaaaaaaaaaaaaaaaaaaaa"
WORKERS = 2
SERVE = ("-m", "gateway_cli", "serve", "--workers", str(WORKERS), "--port")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ECHO = {"name": "echo", "description": "Echo.", "inputSchema": SCHEMA}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """Two workers, each with a session of its own to a server whose tools are in a file."""
    list_tools(tmp_path, ECHO)
    command = json.dumps([sys.executable, "-S", "-E", str(RAW_SERVER)])
    (tmp_path / "tools.yaml").write_text(
        "version: 1\ntools:\n"
        f"  - {{name: raw, provider: mcp, command: {command}, env: {{TOOLS: {tmp_path / 'listed.json'}}}}}\n"
    )
    (tmp_path / "security.yaml").write_text("version: 1\n")
    env = {"GATEWAY_TOOL_CONFIG": str(tmp_path / "tools.yaml"), "GATEWAY_API_KEY": KEY}
    with running_gateway(tmp_path, env=env, key=KEY, command=SERVE) as started:
        wait_for(lambda: everywhere(started) == {200}, what="both workers offer the tool")
        yield started


def list_tools(home: Path, *tools: dict[str, Any]) -> None:
    (home / "listed.json").write_text(json.dumps(tools))


def everywhere(gateway: Gateway, name: str = "raw__echo") -> set[int]:
    """Statuses of a call in every worker."""
    call = {"arguments": {"a": 1}}
    answers = gateway.ask_each_worker(WORKERS, "POST", f"/tools/{name}/invoke", json_body=call)
    return {answer.status for answer in answers.values()}


def command(
    gateway: Gateway, *arguments: str, answer: str = "", url: str | None = None, key: str = KEY
) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "gateway_cli", "tools", *arguments, "--url", url or gateway.url, "--key", key],
        cwd=gateway.home,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def change(gateway: Gateway, *tools: dict[str, Any]) -> None:
    list_tools(gateway.home, *tools)
    assert gateway.post("/tools/refresh", {}).status == 200


def test_a_changed_tool_is_shown_and_accepted_in_every_worker(gateway: Gateway) -> None:
    status, text = command(gateway, "list")
    assert status == 0 and "raw__echo" in text and "mcp" in text, text
    change(gateway, {**ECHO, "description": "Echo, and \x1b[31mtell all."}, {**ECHO, "name": "second"})
    assert everywhere(gateway) == {403}
    status, text = command(gateway, "list")
    assert status == 1 and "approval" in text and "gateway tools approve raw" in text

    status, text = command(gateway, "approve", "raw", answer="n\n")
    assert status == 1 and "Nothing was accepted" in text and everywhere(gateway) == {403}
    assert '-  "description": "Echo."' in text and "tell all" in text and "\x1b" not in text
    assert "second is new" in text
    assert command(gateway, "approve", "raw")[0] == 2, "nobody is there to answer"

    status, text = command(gateway, "approve", "raw", "echo", answer="y\n")
    assert status == 0 and "Accepted: echo." in text
    assert everywhere(gateway) == {200} and everywhere(gateway, "raw__second") == {403}
    status, text = command(gateway, "approve", "raw", "--yes", "--json")
    assert status == 0 and json.loads(text)["approved"] == ["second"]
    assert everywhere(gateway, "raw__second") == {200}
    status, text = command(gateway, "approve", "raw")
    assert status == 0 and "No tool of 'raw' waits" in text
    assert command(gateway, "list")[0] == 0


def test_what_changed_again_since_it_was_looked_at_is_not_accepted(gateway: Gateway) -> None:
    change(gateway, {**ECHO, "description": "Harmless."})
    (seen,) = gateway.get("/tools/mcp/raw").json()["waiting"]
    change(gateway, {**ECHO, "description": "Harmful."})
    asked = {"tools": ["echo"], "digests": {"echo": seen["digest"]}}
    answer = gateway.post("/tools/mcp/raw/approve", asked)
    assert answer.status == 409 and "changed again" in answer.json()["error"]["message"]
    assert everywhere(gateway) == {403}


def test_a_server_that_offers_nothing_is_shown_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tools.yaml").write_text("tools: [{name: gone, provider: mcp, command: [/nowhere/at-all]}]\n")
    (tmp_path / "security.yaml").write_text("version: 1\n")
    env = {"GATEWAY_TOOL_CONFIG": str(tmp_path / "tools.yaml"), "GATEWAY_API_KEY": KEY}
    with running_gateway(tmp_path, env=env, key=KEY) as gateway:
        wait_for(
            lambda: gateway.get("/tools").json()["entries"][0]["health"]["status"] == "down",
            what="the server is known to be down",
        )
        status, text = command(gateway, "list")
        assert status == 1 and "The entry 'gone' is down: its command, or the folder to run it in, is not found" in text


def test_a_server_that_is_still_being_connected_is_named(tmp_path: Path) -> None:
    silent = json.dumps([sys.executable, "-S", "-E", "-c", "import sys; sys.stdin.read()"])
    (tmp_path / "tools.yaml").write_text(
        f"tools: [{{name: slow, provider: mcp, command: {silent}, connect_timeout: 300}}]\n"
    )
    (tmp_path / "security.yaml").write_text("version: 1\n")
    env = {"GATEWAY_TOOL_CONFIG": str(tmp_path / "tools.yaml"), "GATEWAY_API_KEY": KEY}
    with running_gateway(tmp_path, env=env, key=KEY) as gateway:
        status, text = command(gateway, "list")
        assert status == 1 and "The MCP server 'slow' is not connected yet; ask again in a moment." in text
        assert "no tools" not in text
        status, text = command(gateway, "list", "--json")
        assert status == 1 and [item["entry"] for item in json.loads(text)["connecting"]] == ["slow"]
        status, text = command(gateway, "approve", "slow")
        assert status == 1 and "'slow' is not connected yet" in text


def test_what_cannot_be_done_is_said_in_a_sentence(gateway: Gateway) -> None:
    assert "no MCP server 'other'" in command(gateway, "approve", "other")[1]
    assert "No tool 'x' of 'raw' waits" in command(gateway, "approve", "raw", "x")[1]
    status, text = command(gateway, "list", key="wrong")
    assert status == 1 and "admin key" in text
    status, text = command(gateway, "list", url="http://127.0.0.1:9")
    assert status == 1 and "Nothing answers" in text
