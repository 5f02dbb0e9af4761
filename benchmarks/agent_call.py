"""What an agent call costs over HTTP, against `Runner.run` in process on the same agent and upstream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab

OWN_CLIENT = """\
from agents import Agent, OpenAIChatCompletionsModel, function_tool
from openai import AsyncOpenAI


@function_tool
def get_weather(city: str) -> str:
    \"\"\"The weather in a city.\"\"\"
    return f"The weather in {city} is sunny"


client = AsyncOpenAI(base_url="BASE_URL", api_key="unused", max_retries=0)
model = OpenAIChatCompletionsModel(model="MODEL", openai_client=client)
agent = Agent(name="Bench", instructions="You are terse.", model=model, tools=[get_weather])
"""


@dataclass(frozen=True)
class Case:
    """One kind of agent and call; CPU and p50 are compared."""

    name: str
    model: str
    text: str = lab.AGENT
    streamed: bool = False
    share: float = 1.0


CASES = (
    Case("one turn", "mock-t16"),
    Case("two turns", "mock-tool-t16"),
    Case("streamed, 200 chunks", "mock-t200", streamed=True, share=0.2),
    Case("one turn, own client", "mock-t16", OWN_CLIENT),
    Case("two turns, own client", "mock-tool-t16", OWN_CLIENT),
)


def agent_call(quick: bool) -> dict[str, Any]:
    """One agent call over HTTP ÷ the same run in process, both sides in turn; medians over the rounds."""
    calls, rounds = (200, 1) if quick else (500, 3)
    rows: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    for case in CASES:
        count = round(calls * case.share)
        with lab.mock() as upstream, tempfile.TemporaryDirectory() as folder:
            url = f"http://127.0.0.1:{upstream}/v1"
            text = case.text.replace("MODEL", case.model).replace("BASE_URL", url)
            file = Path(folder) / "agent.py"
            file.write_text(text, encoding="utf-8")
            with lab.gateway(upstream, {"Bench/agent.py": text}) as server:
                for connections in (1, 16):
                    stock, http = [], []
                    for _ in range(rounds):
                        stock.append(_stock(url, file, connections, count, case.streamed))
                        http.append(_http(server, connections, count, case.streamed))
                    name = f"{case.name}, {connections} at once"
                    row = {
                        f"{side} {key}": lab.median([result[key] for result in results])
                        for side, results in (("stock", stock), ("http", http))
                        for key in ("cpu_ms", "p50_ms")
                    }
                    rows[name] = row
                    for key in ("cpu_ms", "p50_ms"):
                        label = "CPU" if key == "cpu_ms" else "p50"
                        ratios[f"{name}: {label} ratio"] = row[f"http {key}"] / row[f"stock {key}"]
    return {"sides": rows} | ratios


def _stock(url: str, file: Path, connections: int, calls: int, streamed: bool) -> dict[str, float]:
    script = Path(__file__).with_name("in_process.py")
    arguments = [url, str(file), str(connections), str(calls), str(calls // 5), "streamed" if streamed else "plain"]
    with lab.on_cores(lab.MEASURED):
        child = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=file.parent,
            env={"PATH": os.environ.get("PATH", ""), "OPENAI_AGENTS_DISABLE_TRACING": "1"},
        )
    try:
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    if child.returncode:
        raise RuntimeError(f"in_process.py ended with {child.returncode}: {err[-1_000:]}")
    result: dict[str, float] = json.loads(out)
    return result


def _http(server: lab.Gateway, connections: int, calls: int, streamed: bool) -> dict[str, float]:
    body = lab.chat("default/bench", stream=streamed)
    lab.load(server.port, connections=connections, requests=max(calls // 5, connections), body=body)
    before = lab.cpu_s(server.process.pid)
    result = lab.load(server.port, connections=connections, requests=calls, body=body)
    used = lab.cpu_s(server.process.pid) - before
    return {"cpu_ms": used * 1000 / calls, "p50_ms": result["lat"]["p50"] / 1000}
