"""What many cost: keys, models, agents, label sets in a scrape, idle streams."""

from __future__ import annotations

import functools
import json
import resource
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lab

_FOREVER = "mock-t3-d3600000"
"""A stream whose second event comes an hour after the first."""


def growth(quick: bool) -> dict[str, Any]:
    """CPU per call among many keys and models, or agents, ÷ among ten, each call with the next of them."""
    many, agents, calls, rounds = (500, 50, 1_000, 1) if quick else (10_000, 500, 10_000, 3)
    figures: dict[str, Any] = {"keys and models": many, "agents": agents}
    with lab.mock() as mock:
        few = lab.gateway(mock, _keys_and_models(mock, 10))
        crowd = lab.gateway(mock, _keys_and_models(mock, many), timeout_s=120)
        with few as small, crowd as large:
            cases = ((small, 10), (large, many))
            figures |= _growth("mock/mock-m%d", cases, calls, rounds, key=f"{lab.KEY}-%d")
        few = lab.gateway(mock, _agents(10))
        crowd = lab.gateway(mock, _agents(agents), timeout_s=120)
        with few as small, crowd as large:
            cases = ((small, 10), (large, agents))
            shown = _growth("default/agent-%d", cases, calls // 10, rounds, key=lab.KEY)
            figures |= {f"agents: {name}": value for name, value in shown.items()}
    return figures


def _growth(
    model: str, cases: tuple[tuple[lab.Gateway, int], ...], calls: int, rounds: int, *, key: str
) -> dict[str, float]:
    body = lab.chat(model)
    used: dict[int, list[float]] = {count: [] for _, count in cases}
    for number in range(rounds + 1):
        for server, count in cases:
            before = lab.cpu_s(server.process.pid)
            lab.load(server.port, connections=16, requests=max(calls, count), body=body, key=key, rotate=count)
            if number:  # the first round meets every key and model for the first time
                used[count].append((lab.cpu_s(server.process.pid) - before) * 1e6 / max(calls, count))
    few, many = (lab.median(values) for values in used.values())
    return {"CPU per call among 10, µs": few, "CPU per call among many, µs": many, "ratio": many / few}


def _keys_and_models(mock: int, count: int) -> dict[str, str]:
    return {
        "/security.yaml": lab.security([lab.KEY, *(f"{lab.KEY}-{number}" for number in range(count))]),
        "/upstreams.yaml": lab.upstreams(mock, [f"mock-m{number}" for number in range(count)]),
    }


def _agents(count: int) -> dict[str, str]:
    rows = [
        {"name": f"agent-{number}", "instructions": "You are terse.", "model": "mock-t16", "upstream": "mock"}
        for number in range(count)
    ]
    return {"/agents.yaml": json.dumps({"version": 1, "agents": rows})}


def scrape(quick: bool) -> dict[str, Any]:
    """How long a scrape of 1,000 label sets holds up the event loop: the slowest `/health` beside it, less a usual one.

    A thousand models were called, so that every family by model has as many label sets.
    """
    models, scrapes = (100, 3) if quick else (1_000, 25)
    with lab.mock() as mock, lab.gateway(mock, _keys_and_models(mock, models)) as server:
        lab.load(server.port, connections=4, requests=models, body=lab.chat("mock/mock-m%d"), rotate=models)
        text = server.get("/metrics/prometheus").body
        series = text.count(b"gen_ai_server_request_duration_count{")
        if series < models:
            raise RuntimeError(f"the scrape shows {series} models of {models}")
        quiet = [_slowest_beside(server.port, None) for _ in range(scrapes)]
        beside = [_slowest_beside(server.port, "/metrics/prometheus") for _ in range(scrapes)]
        json_too = [_slowest_beside(server.port, "/metrics") for _ in range(scrapes)]
        usual = lab.median([row["p50"] for row in quiet])
    return {
        "label sets": series,
        "bytes": len(text),
        "usual /health, ms": usual,
        "loop blocked without a scrape, ms": lab.median([row["max"] for row in quiet]) - usual,
        "loop blocked by a scrape, ms": lab.median([row["max"] for row in beside]) - usual,
        "loop blocked by the JSON summary, ms": lab.median([row["max"] for row in json_too]) - usual,
    }


def _slowest_beside(port: int, path: str | None) -> dict[str, float]:
    """Milliseconds of `/health`, asked without a pause for a tenth of a second, while ``path`` is answered once."""
    load = str(lab.build("load"))
    common = ["-p", str(port), "-k", lab.KEY, "-g", "-c", "1"]
    with lab.on_cores(lab.REST):
        probe = subprocess.Popen([load, *common, "-u", "/health", "-D", "0.1"], stdout=subprocess.PIPE, text=True)
        time.sleep(0.03)
        if path is not None:  # at the lowest priority: what reads the scrape must not hold up the probe
            subprocess.run(["nice", "-n", "19", load, *common, "-u", path, "-n", "1"], check=True, capture_output=True)
        out, _ = probe.communicate(timeout=30)
    shown = json.loads(out)["lat"]
    return {"p50": shown["p50"] / 1000, "max": shown["max"] / 1000}


def idle_streams(quick: bool) -> dict[str, Any]:
    """Resident memory of the serving process for each open stream that has sent its first event and waits."""
    count = 100 if quick else 1_000
    figures: dict[str, Any] = {"streams": count}
    files = {"Bench/agent.py": lab.AGENT.replace("MODEL", _FOREVER)}
    with _many_files(), lab.mock() as mock:
        for name, model in (("relayed", f"mock/{_FOREVER}"), ("agent", "default/bench")):
            with lab.gateway(mock, files) as server:
                with _streams(server.port, model, 20):  # whatever the first streams load stays, the store included
                    pass
                lab.wait_for(
                    functools.partial(server.log_events, "store.opened"), what="the ledger has written", timeout_s=60
                )
                before = server.rss_mb()
                with _streams(server.port, model, count):
                    figures[f"{name}: KB each"] = (server.rss_mb() - before) * 1024 / count
    return figures


@contextmanager
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _streams(port: int, model: str, count: int) -> Iterator[None]:
    """Open streams; enter when each has had its first event."""
    body = json.dumps(lab.chat(model, stream=True)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {lab.KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    sockets: dict[int, socket.socket] = {}
    poll = select.poll()
    try:
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", port), 10)
            sockets[one.fileno()] = one
            one.sendall(head + body)
            poll.register(one, select.POLLIN)
        waiting = dict.fromkeys(sockets, b"")
        deadline = time.monotonic() + 60
        while waiting:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(waiting)} of {count} streams have no event after 60 s")
            for number, _ in poll.poll(1_000):
                got = sockets[number].recv(65_536)
                waiting[number] += got
                if not got or not waiting[number].startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"a stream was refused: {waiting[number][:300]!r}")
                if b'"content"' in waiting[number]:
                    del waiting[number]
                    poll.unregister(number)
        yield
    finally:
        for one in sockets.values():
            one.close()
