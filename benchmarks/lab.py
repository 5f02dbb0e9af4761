"""The bench: builds the C tools, pins processes to cores, starts upstream and gateway, reads CPU and memory."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.support.server import Gateway, descendants, free_port, running_gateway  # noqa: E402
from tests.support.waiting import wait_for  # noqa: E402

BUILD = ROOT / "build" / "bench"
TICKS = os.sysconf("SC_CLK_TCK")
_CORES = sorted(os.sched_getaffinity(0))
MEASURED, REST = {_CORES[0]}, {_CORES[-1]}

AGENT = """\
from agents import Agent, function_tool


@function_tool
def get_weather(city: str) -> str:
    \"\"\"The weather in a city.\"\"\"
    return f"The weather in {city} is sunny"


agent = Agent(name="Bench", instructions="You are terse.", model="MODEL", tools=[get_weather])
"""


def build(name: str) -> Path:
    """Compile ``benchmarks/NAME.c`` if it is newer than its binary; return the binary."""
    source, target = Path(__file__).with_name(f"{name}.c"), BUILD / name
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-o", str(target), str(source), "-lm"], check=True)
    return target


@contextmanager
def mock() -> Iterator[int]:
    """Run the mock upstream; yield its port."""
    port = free_port()
    process = subprocess.Popen([build("mock"), str(port)], stderr=subprocess.DEVNULL)
    os.sched_setaffinity(process.pid, REST)
    try:
        wait_for(lambda: _accepts(port), what="the mock upstream listens")
        yield port
    finally:
        process.kill()
        process.wait()


def load(
    port: int, path: str, *, connections: int, requests: int, body: Any = None, warm_up: int = 0
) -> dict[str, Any]:
    """Run the load generator to its end; return its figures (times in µs). Raises on any failed answer."""
    command = [str(build("load")), "-p", str(port), "-u", path, "-c", str(connections), "-n", str(requests)]
    command += ["-w", str(warm_up), "-k", "dev-secret"]
    command += ["-g"] if body is None else ["-b", json.dumps(body)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=_to_the_rest)
    figures: dict[str, Any] = json.loads(done.stdout)
    if figures["errors"]:
        raise RuntimeError(f"{figures['errors']} of {requests} answers failed: {figures['last_error']}")
    return figures


@contextmanager
def gateway(
    mock_port: int | None, files: Mapping[str, str], *, pinned: bool = True, **options: Any
) -> Iterator[Gateway]:
    """Run a gateway with drop-ins (relative path → text), pinned to the measured core unless told otherwise."""
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        home = Path(folder)
        if mock_port is not None:
            upstream = {
                "name": "mock",
                "base_url": f"http://127.0.0.1:{mock_port}/v1",
                "models": ["mock", "mock-*"],
                "default_model": "mock-t16",
            }
            (home / "upstreams.yaml").write_text(json.dumps({"version": 1, "upstreams": [upstream]}), encoding="utf-8")
        for name, text in files.items():
            path = home / "agents" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, MEASURED if pinned else before)
        try:
            started = running_gateway(home, key="dev-secret", **options)
            with started as server:
                os.sched_setaffinity(0, before)
                yield server
        finally:
            os.sched_setaffinity(0, before)


def weather_agents(count: int, model: str = "mock-t16") -> dict[str, str]:
    """``count`` agents like the README's."""
    return {f"Agent{index}/agent.py": AGENT.replace("MODEL", model) for index in range(count)}


def chat(model: str, *, stream: bool = False) -> dict[str, Any]:
    """A small request."""
    return {
        "model": model,
        "stream": stream,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    }


def cpu_s(pid: int, *, tree: bool = True) -> float:
    """CPU seconds a process (and everything below it) has used."""
    pids = [pid, *(descendants(pid) if tree else ())]
    total = 0
    for one in pids:
        try:
            fields = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def import_of_the_sdk_s() -> float:
    """Wall time of a fresh process that does nothing but ``import agents``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import agents"], check=True, cwd="/")
    return time.perf_counter() - started


def _to_the_rest() -> None:
    os.sched_setaffinity(0, REST)


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False
