"""Where the time of one kind of call goes: the gateway in this process, under cProfile.

    python benchmarks/profiling.py [call|stream|long|agent] [--calls N] [--sort tottime|cumtime] [--out FILE]

cProfile makes many small functions look dearer than they are: use it to find what is called, and `make bench` to see
what it is worth. ``--out`` writes the raw profile, for snakeviz and the like. The last line is CPU per call *without*
the profiler, from a run before it.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import lab
import uvicorn
import uvloop

CALLS = {
    "call": ("mock/mock", False, 4_000, "What is the weather in Paris?"),
    "stream": ("mock/mock-t200-d5", True, 32, "What is the weather in Paris?"),
    "long": ("mock/mock", False, 200, "word " * 84_000),
    "agent": ("default/bench", False, 600, "What is the weather in Paris?"),
}


def main() -> None:
    """Profile what the command line asks for."""
    parser = argparse.ArgumentParser(description="Profile one kind of call; see the head of benchmarks/profiling.py.")
    parser.add_argument("kind", nargs="?", choices=CALLS, default="call")
    parser.add_argument("--calls", type=int, help="how many; the default depends on the kind")
    parser.add_argument("--sort", choices=("tottime", "cumtime"), default="tottime")
    parser.add_argument("--lines", type=int, default=45)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, streamed, calls, prompt = CALLS[options.kind]
    calls = options.calls or calls
    body = lab.chat(model, stream=streamed)
    body["messages"][0]["content"] = prompt
    with tempfile.TemporaryDirectory(prefix="gateway-profile-") as folder, lab.mock() as mock:
        home = Path(folder)
        (home / "agents" / "Bench").mkdir(parents=True)
        if options.kind == "agent":
            text = lab.AGENT.replace("MODEL", "mock-t16")
            (home / "agents" / "Bench" / "agent.py").write_text(text, encoding="utf-8")
        (home / "security.yaml").write_text(lab.security([lab.KEY]), encoding="utf-8")
        (home / "upstreams.yaml").write_text(lab.upstreams(mock, ["mock", "mock-*"]), encoding="utf-8")
        os.environ |= {
            "GATEWAY_AGENT_DISCOVERY_PATH": str(home / "agents"),
            "GATEWAY_STATE_DIR": str(home / "state"),
            "GATEWAY_SECURITY_CONFIG": str(home / "security.yaml"),
            "GATEWAY_UPSTREAM_CONFIG": str(home / "upstreams.yaml"),
        }
        log = os.open(home / "gateway.log", os.O_WRONLY | os.O_CREAT)
        shown = os.dup(2)
        os.dup2(log, 2)  # the lines are written as ever, to a file
        try:
            profile, plain_s = _profiled(body, calls)
        finally:
            os.dup2(shown, 2)
    stats = pstats.Stats(profile)
    if options.out:
        stats.dump_stats(options.out)
    stats.strip_dirs().sort_stats(options.sort).print_stats(options.lines)
    print(f"{calls} calls, {plain_s * 1e6 / calls:.0f} µs of CPU each without the profiler")


def _profiled(body: dict[str, object], calls: int) -> tuple[cProfile.Profile, float]:
    port = lab.free_port()
    config = uvicorn.Config("api.main:app", host="127.0.0.1", port=port, access_log=False, http=lab.PROTOCOL)
    server = uvicorn.Server(config)
    profile = cProfile.Profile()

    async def drive() -> float:
        """CPU seconds without the profiler; the waiting is done in a thread, which the profile does not see."""

        async def load(count: int) -> None:
            await asyncio.to_thread(lab.load, port, connections=16, requests=count, body=body)

        async def answered() -> bool:
            with suppress(RuntimeError):
                await load(1)
                return True
            return False

        while not await answered():  # each try takes a moment, and starts a process
            pass
        await load(max(16, calls // 10))
        before = time.process_time()
        await load(calls)
        used = time.process_time() - before
        profile.enable()
        await load(calls)
        profile.disable()
        return used

    async def serve() -> float:
        serving = asyncio.create_task(server.serve())
        try:
            return await asyncio.wait_for(drive(), 300)
        finally:
            server.should_exit = True
            await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return profile, runner.run(serve())


if __name__ == "__main__":
    main()
