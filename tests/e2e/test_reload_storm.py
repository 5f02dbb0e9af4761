"""Fifty agents stream through two hundred random edits, breaks, renames and deletes: no healthy stream is cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

from tests.support.house import CHAT, write_agent
from tests.support.server import Gateway

STEADY = 50
RESTLESS = 25
ACTIONS = 200
SEED = 20_261_120
WORDS = "one two three four five six seven eight nine ten eleven twelve"


class Editor:
    """Does random things to files. ``Steady*`` agents are edited and broken, never removed; ``Restless*`` all of it."""

    def __init__(self, agents: Path, random_: random.Random) -> None:
        self.agents = agents
        self.random = random_
        self.number = 0
        self.restless = [f"Restless{i}" for i in range(RESTLESS)]
        self.count: dict[str, int] = {}

    def act(self) -> None:
        """Do one thing."""
        self.number += 1
        steady = f"Steady{self.random.randrange(STEADY)}"
        restless = self.random.choice(self.restless)
        action = self.random.choice(("edit", "edit", "break", "half", "rename", "delete", "restore", "helper"))
        self.count[action] = self.count.get(action, 0) + 1
        match action:
            case "edit":
                write_agent(self.agents, steady, f"Version {self.number}.")
            case "break":
                (self.agents / steady / "agent.py").write_text("def broken(:\n", encoding="utf-8")
            case "half":
                path = self.agents / steady / "agent.py"
                path.write_bytes(path.read_bytes()[: self.random.randrange(10, 40)])
            case "rename":
                folder = self.agents / restless
                if folder.exists():
                    target = self.agents / f"{restless}x{self.number}"
                    folder.rename(target)
                    target.rename(folder)
            case "delete":
                (self.agents / restless / "agent.py").unlink(missing_ok=True)
            case "restore":
                write_agent(self.agents, restless, f"Restored {self.number}.")
            case "helper":
                (self.agents / steady / "notes.py").write_text(f"N = {self.number}\n", encoding="utf-8")


async def stream(port: int, model: str, delay_s: float) -> str:
    """Read one whole stream by hand; return the text, or raise with what came instead."""
    text = f"[delay={delay_s}] say {WORDS}"
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": text}]}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            f"authorization: Bearer {CHAT}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        raw = await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()
    top, _, rest = raw.decode().partition("\r\n\r\n")
    assert " 200 " in top.splitlines()[0], f"{model}: {raw[:600]!r}"
    events = [line[6:] for line in rest.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", f"{model}: the stream ends with {events[-1]}"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def test_no_healthy_stream_fails_or_is_cut(start: Callable[..., Gateway]) -> None:
    def prepare(home: Path) -> None:
        for index in range(STEADY):
            write_agent(home / "agents", f"Steady{index}", "Version 0.")
        for index in range(RESTLESS):
            write_agent(home / "agents", f"Restless{index}", "Version 0.")

    gateway = start(prepare=prepare, timeout_s=60)
    editor = Editor(gateway.agents, random.Random(SEED))
    served = asyncio.run(storm(gateway, editor))

    assert editor.number == ACTIONS and len(editor.count) >= 6
    assert served >= STEADY * 2
    assert gateway.process.poll() is None
    assert not gateway.log_events("http.request.crashed")
    for index in range(STEADY):
        write_agent(gateway.agents, f"Steady{index}", "After the storm.")
    listed = gateway.post("/agents/refresh").json()
    steady = {e["qualified_name"]: e["status"] for e in listed if "steady" in e["qualified_name"]}
    assert set(steady.values()) == {"ready"} and len(steady) == STEADY


async def storm(gateway: Gateway, editor: Editor) -> int:
    """Keep a stream open on every steady agent until the edits are done; return how many were served."""
    over = asyncio.Event()
    served = 0

    async def keep_streaming(index: int) -> None:
        nonlocal served
        rounds = 0
        while not over.is_set() or rounds < 2:
            assert await stream(gateway.port, f"default/steady{index}", 0.05 + index % 7 / 50) == WORDS
            served += 1
            rounds += 1

    async def edit() -> None:
        for _ in range(ACTIONS):
            await asyncio.to_thread(editor.act)
            await asyncio.sleep(editor.random.uniform(0.01, 0.1))
        over.set()

    async with asyncio.TaskGroup() as group:
        for index in range(STEADY):
            group.create_task(keep_streaming(index))
        group.create_task(edit())
    return served
