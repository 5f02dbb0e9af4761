"""What a relayed call, a streamed chunk and a long prompt cost, against nginx and against no gateway at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab

CHUNKS = 200

NGINX = """\
daemon off; master_process off; pid {folder}/pid; error_log /dev/null;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 1m; client_body_temp_path {folder}; client_body_buffer_size 1m;
  proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream mock {{ server 127.0.0.1:{mock}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Side:
    """Where calls go: ``prefix`` comes before a model's name, ``pid`` None means that its CPU is not read."""

    name: str
    port: int
    prefix: str = ""
    pid: int | None = None


@dataclass(frozen=True)
class Case:
    """One kind of call; CPU is divided by calls times ``units``."""

    model: str
    connections: int
    calls: int
    units: int = 1
    prompt: str = "What is the weather in Paris?"


def pass_through(quick: bool) -> dict[str, Any]:
    """Ratios to nginx in the same run, with the targets of `performance.md` beside them."""
    scale, rounds = (3, 1) if quick else (1, 5)
    cases = {
        "one": Case("mock", 1, 2_000 // scale),
        "call": Case("mock", 16, 6_000 // scale),
        "many": Case("mock", 64, 6_400 // scale),
        "chunk": Case(f"mock-t{CHUNKS}-d5", 16, 48 // scale, CHUNKS + 1),
        "long": Case("mock", 4, 300 // scale, prompt="word " * 84_000),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        mock = stack.enter_context(lab.mock())
        server = stack.enter_context(lab.gateway(mock, {}))
        sides = [Side("direct", mock), Side("gateway", server.port, "mock/", server.process.pid)]
        if shutil.which("nginx"):
            sides.append(stack.enter_context(_nginx(mock)))
        for _ in range(rounds):
            for name, case in cases.items():
                for side in sides:
                    found.setdefault((side.name, name), []).append(_measured(side, case))

    def figure(side: str, case: str, key: str) -> float:
        return lab.median([row[key] for row in found[side, case]])

    figures: dict[str, Any] = {
        "CPU per call, 16 at once, µs": figure("gateway", "call", "cpu_us"),
        "CPU per streamed chunk, µs": figure("gateway", "chunk", "cpu_us"),
        "CPU per call with a 420 kB prompt, µs (at most 800)": figure("gateway", "long", "cpu_us"),
        "calls/s, 64 at once": figure("gateway", "many", "per_s"),
        "added p50, 1 at once, µs": figure("gateway", "one", "p50") - figure("direct", "one", "p50"),
        "p99, 1 at once, µs (at most 500)": figure("gateway", "one", "p99"),
        "added time to first token, 16 streams, µs (at most 600)": figure("gateway", "chunk", "ttft")
        - figure("direct", "chunk", "ttft"),
        "added delay per chunk, p50, µs (at most 100)": figure("gateway", "chunk", "delay_p50")
        - figure("direct", "chunk", "delay_p50"),
        "added delay per chunk, p99, µs (at most 500)": figure("gateway", "chunk", "delay_p99")
        - figure("direct", "chunk", "delay_p99"),
    }
    if len(sides) == 3:
        figures |= {
            "CPU per call ÷ nginx (at most 6)": figure("gateway", "call", "cpu_us") / figure("nginx", "call", "cpu_us"),
            "CPU per chunk ÷ nginx (at most 2.7)": figure("gateway", "chunk", "cpu_us")
            / figure("nginx", "chunk", "cpu_us"),
            "added p50 ÷ nginx (at most 2)": figures["added p50, 1 at once, µs"]
            / (figure("nginx", "one", "p50") - figure("direct", "one", "p50")),
        }
    return figures


def _measured(side: Side, case: Case) -> dict[str, float]:
    body = lab.chat(side.prefix + case.model, stream=case.units > 1)
    body["messages"][0]["content"] = case.prompt
    before = lab.cpu_s(side.pid) if side.pid is not None else 0.0
    result = _load(side.port, case, body)
    used = lab.cpu_s(side.pid) - before if side.pid is not None else 0.0
    return {
        "cpu_us": used * 1e6 / (case.calls * case.units),
        "per_s": result["rps"],
        "p50": result["lat"]["p50"],
        "p99": result["lat"]["p99"],
    } | (_of_stream(result) if case.units > 1 else {})


def _of_stream(result: dict[str, Any]) -> dict[str, float]:
    return {
        "ttft": result["ttft"]["p50"],
        "delay_p50": result["down_leg"]["p50"],
        "delay_p99": result["down_leg"]["p99"],
    }


def _load(port: int, case: Case, body: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # longer than an argument may be
        json.dump(body, file)
        file.flush()
        command = [str(lab.build("load")), "-p", str(port), "-u", "/v1/chat/completions", "-k", "dev-secret"]
        command += ["-c", str(case.connections), "-n", str(case.calls), "-f", file.name]
        cores = ",".join(map(str, lab.REST))
        done = subprocess.run(["taskset", "-c", cores, *command], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    if result["errors"]:
        raise RuntimeError(f"{result['errors']} of {case.calls} answers failed: {result['last_error']}")
    return result


@contextmanager
def _nginx(mock: int) -> Iterator[Side]:
    with tempfile.TemporaryDirectory(prefix="nginx-bench-") as folder:
        port = lab.free_port()
        config = Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, mock=mock, port=port), encoding="utf-8")
        cores = ",".join(map(str, lab.MEASURED))
        process = subprocess.Popen(["taskset", "-c", cores, "nginx", "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            lab.wait_for(lambda: lab._accepts(port), what="nginx listens")
            yield Side("nginx", port, "", process.pid)
        finally:
            process.terminate()
            process.wait()
