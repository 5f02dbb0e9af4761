"""The bench: builds the C tools, pins processes to cores, starts upstream and gateway, reads CPU and memory."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.support.server import Gateway, descendants, free_port, running_gateway  # noqa: E402
from tests.support.waiting import wait_for  # noqa: E402

BUILD = ROOT / "build" / "bench"
TICKS = os.sysconf("SC_CLK_TCK")
_CORES = sorted(os.sched_getaffinity(0))
ALL, MEASURED, REST = set(_CORES), {_CORES[0]}, {_CORES[-1]}

KEY = "sk-bench"
PROTOCOL = "api.protocol:GatewayProtocol"
"""The class that `gateway serve` speaks HTTP with, as `uvicorn --http` takes it."""
COMMAND = ("-m", "gateway_cli", "serve", "--host", "127.0.0.1", "--port")

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
    upstream = subprocess.Popen([build("mock"), str(port)], stderr=subprocess.DEVNULL, preexec_fn=_to_the_rest)
    try:
        wait_for(lambda: accepts(port), what="the mock upstream listens")
        yield port
    finally:
        upstream.kill()
        upstream.wait()


def load(
    port: int,
    path: str = "/v1/chat/completions",
    *,
    connections: int,
    requests: int,
    body: Any = None,
    key: str = KEY,
    headers: Iterable[str] = (),
    rotate: int = 0,
    chunks: int | None = None,
) -> dict[str, Any]:
    """Run the load generator to its end; return its figures (times in µs). Raises on any failed answer.

    Without a ``body`` it asks with GET. ``rotate`` puts the number of the request, modulo this, in place of ``%d`` in
    key and body. ``chunks`` is how many a stream must have.
    """
    command = [str(build("load")), "-p", str(port), "-u", path, "-c", str(connections), "-n", str(requests), "-k", key]
    command += [part for header in headers for part in ("-H", header)]
    if rotate:
        command += ["-M", str(rotate)]
    if chunks is not None:
        command += ["-x", str(chunks)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # a prompt may be longer than an argument
        json.dump(body, file)
        file.flush()
        command += ["-g"] if body is None else ["-f", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=_to_the_rest)
    if not done.stdout:
        raise RuntimeError(f"the load generator ended with {done.returncode}: {done.stderr.strip()}")
    figures: dict[str, Any] = json.loads(done.stdout)
    if figures["errors"]:
        raise RuntimeError(f"{figures['errors']} of {requests} answers failed: {figures['last_error']}")
    return figures


@contextmanager
def gateway(
    mock_port: int | None, files: Mapping[str, str], *, pinned: bool = True, **options: Any
) -> Iterator[Gateway]:
    """Run a gateway with drop-ins (path below the agents folder → text), pinned to the measured core unless told
    otherwise. A path that starts with ``/`` is below the folder of configuration.

    Every duty is on: the key is one of `security.yaml`, with patterns and a limit; metrics and logs are written.
    """
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        home = Path(folder)
        config = {"security.yaml": security([KEY])}
        if mock_port is not None:
            config["upstreams.yaml"] = upstreams(mock_port, ["mock", "mock-*"])
        config |= {name[1:]: text for name, text in files.items() if name.startswith("/")}
        dropins = {f"agents/{name}": text for name, text in files.items() if not name.startswith("/")}
        for name, text in (config | dropins).items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        options.setdefault("command", COMMAND)
        with on_cores(MEASURED if pinned else None), running_gateway(home, key=KEY, **options) as server:
            os.sched_setaffinity(0, ALL)
            yield server


def security(keys: Sequence[str]) -> str:
    """A `security.yaml` (JSON is YAML) whose keys reach everything by the last of twenty patterns, within a limit."""
    patterns = [*(f"team-{number}/*" for number in range(18)), "default/*", "mock/*"]
    rows = [
        {
            "id": f"key-{index}",
            "hashed_key": hashlib.sha256(key.encode()).hexdigest(),
            "allow_agents": patterns,
            "scopes": ["chat", "admin", "metrics"] if index == 0 else ["chat"],
            "limits": {"requests_per_minute": 100_000_000},
        }
        for index, key in enumerate(keys)
    ]
    return json.dumps({"version": 1, "api_keys": rows})


def upstreams(mock_port: int, models: Sequence[str]) -> str:
    """An `upstreams.yaml` with the mock as ``mock``."""
    row = {
        "name": "mock",
        "base_url": f"http://127.0.0.1:{mock_port}/v1",
        "models": list(models),
        "default_model": "mock-t16",
    }
    return json.dumps({"version": 1, "upstreams": [row]})


@contextmanager
def on_cores(cores: set[int] | None) -> Iterator[None]:
    """Start processes on these cores; this one is free again at the end."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ALL)


@contextmanager
def process(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None) -> Iterator[int]:
    """Run a server of somebody else's on the measured core; yield its process id. It and its children are killed."""
    with on_cores(MEASURED):
        started = subprocess.Popen(
            command,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield started.pid
    finally:
        family = descendants(started.pid)
        for pid in (started.pid, *family):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.wait()


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


def rss_mb(pid: int) -> float:
    """Resident memory of one process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def answers(ask: Callable[[], bool]) -> bool:
    """Whether a server answers as ``ask`` wants, a refused connection being a no."""
    try:
        return ask()
    except (OSError, http.client.HTTPException):
        return False


def _to_the_rest() -> None:
    os.sched_setaffinity(0, REST)


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False
