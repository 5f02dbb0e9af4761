"""Every measure by its name, and those of a process's life: start, reloads, memory. Each returns its figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import lab
from agent_call import agent_call
from crowds import growth, idle_streams, scrape
from pass_through import pass_through

Figures = dict[str, Any]


def startup(quick: bool) -> Figures:
    """From the start of the process to the first answers, ÷ `import agents` alone; 20 agents, all cores."""
    rounds = []
    with lab.mock() as upstream:
        lab.import_of_the_sdk_s()
        for _ in range(1 if quick else 5):
            sdk = lab.import_of_the_sdk_s()
            seen: dict[str, float] = {}
            started = time.perf_counter()
            with lab.gateway(upstream, lab.weather_agents(20), pinned=False, ready=None) as server:
                for name, ask in _first_answers(server).items():
                    while not ask():
                        time.sleep(0.005)
                    seen[name] = time.perf_counter() - started
            rounds.append({"import agents, s": sdk} | seen)
    figures: Figures = {name: lab.median([r[name] for r in rounds]) for name in rounds[0]}
    figures["first agent answer ÷ import agents"] = figures["first agent answer, s"] / figures["import agents, s"]
    figures["raw model before the SDK could have been imported"] = figures["raw model, s"] < figures["import agents, s"]
    return figures


def _first_answers(server: lab.Gateway) -> dict[str, Callable[[], bool]]:
    def asks(method: str, path: str, body: Any = None) -> Callable[[], bool]:
        def ask() -> bool:
            try:
                return server.request(method, path, json_body=body).status == 200
            except OSError:
                return False

        return ask

    return {
        "/health, s": asks("GET", "/health"),
        "raw model, s": asks("POST", "/v1/chat/completions", lab.chat("mock/mock")),
        "first agent answer, s": asks("POST", "/v1/chat/completions", lab.chat("default/agent0")),
    }


def listing(quick: bool) -> Figures:
    """GET /v1/models with 500 agents, 50 broken, one hanging at import; all cores."""
    good, broken = (50, 5) if quick else (500, 50)
    files = lab.weather_agents(good)
    files |= {f"Broken{i}/agent.py": "agent = undefined_name\n" for i in range(broken)}
    files["Hanging/agent.py"] = "while True:\n    pass\n"
    started = time.perf_counter()
    with lab.mock() as upstream, lab.gateway(upstream, files, pinned=False, ready="/health", timeout_s=120) as server:
        while_loading = lab.load(server.port, "/v1/models", connections=1, requests=200)
        lab.wait_for(
            lambda: len(server.model_ids()) >= good, timeout_s=300, every_s=0.1, what="every good agent is listed"
        )
        loaded_s = time.perf_counter() - started
        result = lab.load(server.port, "/v1/models", connections=1, requests=300 if quick else 3000)
    return {
        "agents": good,
        "loaded_s": loaded_s,
        "p50_ms": result["lat"]["p50"] / 1000,
        "p99_ms": result["lat"]["p99"] / 1000,
        "p99_ms_while_loading": while_loading["lat"]["p99"] / 1000,
    }


def reloads(quick: bool) -> Figures:
    """Growth of resident memory over 200 reloads of one agent."""
    count = 30 if quick else 200
    with lab.mock() as upstream, lab.gateway(upstream, lab.weather_agents(1)) as server:

        def reload(number: int) -> None:
            text = lab.AGENT.replace("MODEL", "mock-t16") + f"# {number}\n"
            (server.agents / "Agent0" / "agent.py").write_text(text, encoding="utf-8")
            listed = server.post("/agents/refresh").json()
            hashes.add(listed[0]["metadata"]["content_hash"])

        hashes: set[str] = set()
        for number in range(20):
            reload(number)
        before = server.rss_mb()
        started = time.perf_counter()
        for number in range(20, 20 + count):
            reload(number)
        took = time.perf_counter() - started
        after = server.rss_mb()
        if len(hashes) != count + 20:
            raise RuntimeError(f"only {len(hashes)} of {count + 20} reloads were seen")
    return {
        "reloads": count,
        "rss_before_mb": before,
        "growth_mb": after - before,
        "ms_per_reload": took * 1000 / count,
    }


def memory(quick: bool) -> Figures:
    """Resident memory of the serving process without and with agents, and its growth over calls."""
    calls = 1000 if quick else 20_000
    with lab.mock() as upstream:
        with lab.gateway(upstream, {}) as server:
            _serve(server, "mock/mock", 2000)
            without = server.rss_mb()
        with lab.gateway(upstream, lab.weather_agents(20)) as server:
            _serve(server, "default/agent0", 500)
            with_agents = server.rss_mb()
            children = {pid: lab.rss_mb(pid) for pid in lab.descendants(server.process.pid)}
            _serve(server, "default/agent0", calls // 2)
            _serve(server, "mock/mock", calls // 2)
            grown = server.rss_mb() - with_agents
    return {
        "without_agents_mb": without,
        "with_20_agents_mb": with_agents,
        "fork_server_mb": sum(children.values()),
        "calls": calls,
        "growth_mb": grown,
    }


def _serve(server: lab.Gateway, model: str, calls: int) -> None:
    lab.load(server.port, connections=16, requests=calls, body=lab.chat(model))


def save_to_served(quick: bool) -> Figures:
    """From the rename that ends a save to the change being visible over HTTP; 100 agents, the watcher on."""
    agents, saves = (20, 10) if quick else (100, 60)
    times = []
    env = {"GATEWAY_AGENT_AUTO_RELOAD": "1"}
    with lab.mock() as upstream, lab.gateway(upstream, lab.weather_agents(agents), env=env) as server:
        for number in range(saves):
            times.append(_save(server, f"Agent{number % agents}", f"Saved {number}"))
            threading.Event().wait(0.1)  # people do not save in bursts; the watcher gathers what comes together
    return {
        "agents": agents,
        "saves": saves,
        "p50_s": lab.percentile(times, 0.5),
        "p95_s": lab.percentile(times, 0.95),
        "max_s": max(times),
    }


def _save(server: lab.Gateway, agent: str, name: str) -> float:
    """Save an agent under a new display name; return the seconds until the name is served."""
    text = lab.AGENT.replace("MODEL", "mock-t16") + f"\n__gateway__ = {{'display_name': {name!r}}}\n"
    swap = server.agents / agent / ".swap"
    swap.write_text(text, encoding="utf-8")
    saved = time.perf_counter()
    swap.rename(server.agents / agent / "agent.py")
    lab.wait_for(lambda: _display_name(server, agent) == name, every_s=0.005, what=f"{name} is served")
    return time.perf_counter() - saved


def _display_name(server: lab.Gateway, name: str) -> str:
    shown: str = server.get(f"/v1/models/default/{name.lower()}").json()["metadata"]["display_name"]
    return shown


MEASURES: dict[str, Callable[[bool], Figures]] = {
    "pass_through": pass_through,
    "agent_call": agent_call,
    "growth": growth,
    "startup": startup,
    "memory": memory,
    "scrape": scrape,
    "idle_streams": idle_streams,
    "listing": listing,
    "reloads": reloads,
    "save_to_served": save_to_served,
}
