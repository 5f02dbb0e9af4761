"""The yardstick: `Runner.run` on the bench's agent, in this process, with the stock openai client.

    python benchmarks/in_process.py BASE_URL AGENT_FILE CONNECTIONS CALLS WARM_UP plain|streamed

Prints JSON: CPU milliseconds per call and p50 in ms.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

import uvloop
from agents import Agent, OpenAIProvider, RunConfig, Runner
from openai import AsyncOpenAI


async def main(base_url: str, file: str, connections: int, calls: int, warm_up: int, streamed: bool) -> None:
    """Run ``calls`` runs, ``connections`` at a time."""
    agent = load(file)
    client = AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0)
    config = RunConfig(model_provider=OpenAIProvider(openai_client=client, use_responses=False), tracing_disabled=True)
    times: list[float] = []

    async def one() -> None:
        started = time.perf_counter()
        if streamed:
            result = Runner.run_streamed(agent, "What is the weather in Paris?", run_config=config)
            async for _ in result.stream_events():
                pass
        else:
            await Runner.run(agent, "What is the weather in Paris?", run_config=config)
        times.append(time.perf_counter() - started)

    async def worker(share: int) -> None:
        for _ in range(share):
            await one()

    async def batch(count: int) -> None:
        await asyncio.gather(*(worker(count // connections) for _ in range(connections)))

    await batch(max(warm_up, connections))
    times.clear()
    used = time.process_time()
    await batch(calls)
    used = time.process_time() - used
    print(json.dumps({"cpu_ms": used * 1000 / len(times), "p50_ms": statistics.median(times) * 1000}))
    await client.close()


def load(file: str) -> Agent[Any]:
    """Import the agent's file."""
    spec = importlib.util.spec_from_file_location("bench_agent", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    agent: Agent[Any] = module.agent
    return agent


if __name__ == "__main__":
    url, path, at_once, total, warm, mode = sys.argv[1:]
    uvloop.run(main(url, path, int(at_once), int(total), int(warm), mode == "streamed"))
