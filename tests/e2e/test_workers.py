"""`gateway serve --workers`: one gateway in several processes, through death, reload and the end."""

from __future__ import annotations

import http.client
import json
import os
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gateway_cli.main import main
from tests.support.certificates import certificate
from tests.support.house import write_agent
from tests.support.mcp_servers import RAW_SERVER, read_pids
from tests.support.scripted_upstream import Answer, ScriptedUpstream
from tests.support.server import Gateway, StartFailed, descendants, running_gateway
from tests.support.waiting import wait_for

KEY = "sk-test-workers-aaaaaaaaaaaaaaaaaaaaaaaa"
OTHER = "sk-test-workers-bbbbbbbbbbbbbbbbbbbbbbbb"
ENV = {"GATEWAY_API_KEY": KEY, "GATEWAY_SHUTDOWN_DRAIN_S": "2"}
CALL = {"model": "up/m", "messages": [{"role": "user", "content": "x"}]}


def serve(workers: int) -> tuple[str, ...]:
    return ("-m", "gateway_cli", "serve", "--workers", str(workers), "--port")


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, upstream: ScriptedUpstream) -> Path:
    write_upstream(tmp_path, upstream)
    (tmp_path / "security.yaml").write_text("version: 1\n", encoding="utf-8")
    return tmp_path


def write_upstream(home: Path, upstream: ScriptedUpstream, *, name: str = "up") -> None:
    (home / "upstreams.yaml").write_text(
        "version: 1\nupstreams:\n"
        f"  - {{name: {name}, provider: openai-compatible, base_url: '{upstream.base_url}', models: ['*']}}\n",
        encoding="utf-8",
    )


def serving(gateway: Gateway, count: int) -> dict[int, int]:
    """Wait until as many workers serve; return their process ids by slot."""

    def look() -> dict[int, int] | None:
        slots = {line["slot"]: line["pid"] for line in gateway.logged("worker.serving", count=count)}
        alive = {slot: pid for slot, pid in slots.items() if Path(f"/proc/{pid}").exists()}
        return alive if len(alive) == count else None

    found = wait_for(look, what=f"{count} workers serve")
    assert found is not None
    return found


def counted(gateway: Gateway) -> int:
    """Read the number of successful calls that the gateway shows, over all workers."""
    text = gateway.get("/metrics/prometheus").body.decode()
    lines = [line for line in text.splitlines() if line.startswith("agent_gateway_runs_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if 'outcome="success"' in line)


def test_any_worker_shows_all_and_a_killed_one_takes_nothing_along(home: Path) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(3)) as gateway:
        pids = serving(gateway, 3)
        assert sorted(pids) == [0, 1, 2]
        for _ in range(12):
            assert gateway.post("/v1/chat/completions", CALL).status == 200
        assert {counted(gateway) for _ in range(4)} == {12}
        assert {gateway.get("/metrics").json()["total_requests"] for _ in range(4)} == {12}
        time.sleep(0.6)  # what a worker counted in its last half second may be lost with it: that is the promise
        os.kill(pids[1], signal.SIGKILL)
        for _ in range(12):
            assert gateway.post("/v1/chat/completions", CALL).status == 200, "the others serve on"
        replaced = wait_for(lambda: (now := serving(gateway, 3)) and now[1] != pids[1] and now, what="slot 1 is filled")
        assert (replaced[0], replaced[2]) == (pids[0], pids[2])
        assert counted(gateway) == 24
        died = gateway.logged("worker.died")
        assert [(line["slot"], line["pid"]) for line in died] == [(1, pids[1])]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_workers_start_holds_none_of_their_sockets(home: Path) -> None:
    """A port that an MCP server held, too, would stay taken after the gateway's end."""
    pids = home / "pids"
    (home / "tools.yaml").write_text(
        "version: 1\ntools:\n"
        f"  - {{name: raw, provider: mcp, command: ['{sys.executable}', '-S', '-E', '{RAW_SERVER}', '{pids}']}}\n",
        encoding="utf-8",
    )
    env = {**ENV, "GATEWAY_TOOL_CONFIG": str(home / "tools.yaml")}
    with running_gateway(home, command=serve(2), env=env, key=KEY) as gateway:
        workers = serving(gateway, 2)
        wait_for(lambda: pids.exists() and len(read_pids(pids)) == 2, what="each worker has started its MCP server")
        for worker in workers.values():
            assert sockets(worker)
            for pid in read_pids(pids):
                assert not sockets(pid) & sockets(worker)


def sockets(pid: int) -> set[str]:
    """The sockets that a process holds."""
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            held.add(os.readlink(descriptor))
    return {name for name in held if name.startswith("socket:")}


def test_under_load_a_killed_worker_costs_only_its_own_requests(home: Path) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(3)) as gateway:
        pids = serving(gateway, 3)
        calls: list[tuple[float, float, int]] = []
        kills: list[tuple[float, float]] = []
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                began = time.monotonic()
                try:
                    status = gateway.post("/v1/chat/completions", CALL).status
                except (OSError, http.client.HTTPException):
                    status = 0
                calls.append((began, time.monotonic(), status))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for slot in (0, 1):
                seen = len(calls)
                wait_for(lambda: len(calls) > seen + 40, what="calls succeed")  # noqa: B023
                since = time.monotonic()
                os.kill(pids[slot], signal.SIGKILL)
                kills.append((since, time.monotonic()))
            seen = len(calls)
            wait_for(lambda: len(calls) > seen + 40, what="calls go on")
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        assert {status for _, _, status in calls} <= {200, 0}
        failed = [(began, ended) for began, ended, status in calls if status == 0]
        assert len(failed) <= 4 * len(kills), "at most what the dead workers had in hand"
        assert all(any(began - 0.2 <= done and since <= ended for since, done in kills) for began, ended in failed)


def test_a_refresh_reaches_every_worker_and_says_what_all_serve(home: Path, upstream: ScriptedUpstream) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(4)) as gateway:
        serving(gateway, 4)
        first = gateway.post("/upstreams/refresh")
        assert (first.status, first.headers.get("x-gateway-workers")) == (200, "4"), first.body
        write_upstream(home, upstream, name="other")
        second = gateway.post("/upstreams/refresh")
        assert second.status == 200
        assert second.headers["x-gateway-content-hash"] != first.headers["x-gateway-content-hash"]
        moved = CALL | {"model": "other/m"}
        answers = [gateway.post("/v1/chat/completions", moved) for _ in range(12)]
        assert {(answer.status, answer.headers["x-gateway-upstream"]) for answer in answers} == {(200, "other")}
        (home / "upstreams.yaml").write_text("version: 1\nupstreams: 3\n", encoding="utf-8")
        wrong = gateway.post("/upstreams/refresh")
        assert (wrong.status, wrong.error["code"]) == (400, "configuration_error")
        assert "upstreams.yaml:2" in wrong.error["message"]
        assert {gateway.post("/v1/chat/completions", moved).status for _ in range(8)} == {200}
        agents = gateway.post("/agents/refresh")
        assert (agents.status, agents.headers.get("x-gateway-workers")) == (200, "4"), agents.body


def test_a_worker_that_dies_while_files_are_wrong_comes_back_with_what_the_others_serve(
    home: Path, upstream: ScriptedUpstream
) -> None:
    """Every file at once, those that were not there included; then all workers at once; then the files are mended."""
    (home / "agents.yaml").write_text(
        "version: 1\nagents:\n  - {name: kept, instructions: Help., upstream: up, model: m}\n", encoding="utf-8"
    )
    env = ENV | {"GATEWAY_AGENT_CONFIG": str(home / "agents.yaml"), "GATEWAY_AGENT_AUTO_RELOAD": "1"}
    with running_gateway(home, env=env, key=KEY, command=serve(2)) as gateway:
        pids = serving(gateway, 2)
        good = {name: (home / name).read_text() for name in ("upstreams.yaml", "security.yaml", "agents.yaml")}
        (home / "config").mkdir()
        for name in (*good, "config/prices.yaml", "config/routing.yaml", "config/cache.yaml", "config/tools.yaml"):
            (home / name).write_text("version: 1\nwrong: [\n", encoding="utf-8")
        for name in good:
            failed = "agent.config.failed" if name == "agents.yaml" else "config.reload.failed"
            gateway.logged(failed, count=2, file=name)

        def answers() -> set[int]:
            return {gateway.post("/v1/chat/completions", CALL).status for _ in range(8)}

        os.kill(pids[0], signal.SIGKILL)
        gateway.logged("worker.serving", count=3)
        assert answers() == {200}
        (kept,) = gateway.logged("config.kept")
        assert kept["files"] == ["agents.yaml", "security.yaml", "upstreams.yaml"]
        for pid in serving(gateway, 2).values():
            os.kill(pid, signal.SIGKILL)
        gateway.logged("worker.serving", count=5)
        assert answers() == {200}
        for name, text in good.items():
            (home / name).write_text(text, encoding="utf-8")
        shutil.rmtree(home / "config")
        write_upstream(home, upstream, name="other")
        assert gateway.post("/upstreams/refresh").status == 200
        moved = CALL | {"model": "other/m"}
        assert {gateway.post("/v1/chat/completions", moved).status for _ in range(8)} == {200}
        text = gateway.get("/metrics/prometheus").body.decode()
        assert 'agent_gateway_worker_restarts_total{reason="killed"} 3.0' in text
        assert 'agent_gateway_workers{state="serving"} 2.0' in text, [x for x in text.splitlines() if "_worker" in x]


def test_a_worker_that_cannot_start_is_tried_again_and_again_and_said(home: Path) -> None:
    """Where what it needs is gone, no text that was kept helps: the others serve, and everybody is told."""
    secret = home / "secret"
    secret.write_text("s", encoding="utf-8")
    entry = f"{{name: t, provider: http, url: 'https://x.example', headers: {{x-k: 'file:{secret}'}}}}"
    (home / "tools.yaml").write_text(f"version: 1\ntools: [{entry}]\n", encoding="utf-8")
    env = ENV | {"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml")}
    with running_gateway(home, env=env, key=KEY, command=serve(2)) as gateway:
        pids = serving(gateway, 2)
        secret.rename(home / "away")
        os.kill(pids[1], signal.SIGKILL)
        tried = gateway.logged("worker.died", count=3, slot=1)[1:]
        assert all("the secret file secret cannot be read" in line["message"] for line in tried)
        assert [(line["serving"], line["of"]) for line in tried] == [(1, 2), (1, 2)]
        pauses = [line["restart_in_s"] for line in gateway.logged("worker.died", slot=1)]
        assert pauses == sorted(pauses) and 0 < pauses[-1] <= 30
        text = gateway.get("/metrics/prometheus").body.decode()
        assert 'agent_gateway_worker_restarts_total{reason="refused"}' in text
        assert 'agent_gateway_workers{state="serving"} 1.0' in text
        assert 'agent_gateway_workers{state="wanted"} 2.0' in text
        assert {gateway.post("/v1/chat/completions", CALL).status for _ in range(6)} == {200}
        (home / "away").rename(secret)
        gateway.logged("worker.serving", count=3)
        wait_for(lambda: 'state="serving"} 2.0' in gateway.get("/metrics/prometheus").body.decode(), what="all serve")


def test_a_supervisor_that_can_start_no_process_keeps_the_workers_it_has_and_tries_again(home: Path) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(2)) as gateway:
        pids = serving(gateway, 2)
        before = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        os.kill(pids[1], signal.SIGRTMIN + 5)  # of these some have no name
        gateway.logged("worker.died", where=lambda line: "No worker can be started" in line["message"])
        assert gateway.post("/v1/chat/completions", CALL).status == 200, "the other worker serves on"
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, before)
        assert wait_for(lambda: (now := serving(gateway, 2)) and now[1] != pids[1] and now, what="slot 1 is filled")
        assert gateway.process.poll() is None


def test_an_override_holds_in_every_worker_and_in_one_that_comes_later(home: Path) -> None:
    (home / "security.yaml").write_text(
        f"version: 1\napi_keys:\n  - {{id: narrow, key: '{OTHER}', allow_agents: ['nothing/*']}}\n", encoding="utf-8"
    )
    with running_gateway(home, env=ENV, key=KEY, command=serve(2)) as gateway:
        pids = serving(gateway, 2)

        def statuses() -> set[int]:
            return {gateway.post("/v1/chat/completions", CALL, key=OTHER).status for _ in range(10)}

        assert statuses() == {403}
        grant = {"agent": "up/*", "ttl_seconds": 600, "reason": "test", "key_id": "narrow"}
        made = gateway.post("/security/override", grant)
        assert made.status == 200, made.body
        assert statuses() == {200}
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: serving(gateway, 2)[0] != pids[0], what="slot 0 is filled")
        wait_for(lambda: statuses() == {200}, what="the new worker knows the override")


def test_recent_errors_and_endpoint_times_come_from_all_workers(home: Path) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(2)) as gateway:
        serving(gateway, 2)
        broken = CALL | {"model": "up/fault:html"}
        for _ in range(10):
            assert gateway.post("/v1/chat/completions", broken).status == 502
        assert {len(gateway.get("/agents/errors").json()) for _ in range(6)} == {10}
        times = gateway.get("/api/health/endpoints").json()
        (row,) = [row for row in times["endpoints"] if row["endpoint"] == "/v1/chat/completions"]
        assert (row["count"], row["errors"], row["status"], row["status_codes"]) == (10, 10, "unhealthy", {"502": 10})


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_with_ten_live_streams(home: Path, upstream: ScriptedUpstream, workers: int) -> None:
    """Those that end within the drain time are whole, the others are told, and the process is gone in time."""
    with running_gateway(home, env=ENV, key=KEY, command=serve(workers)) as gateway, ExitStack() as stack:
        if workers > 1:
            serving(gateway, workers)
        gate = upstream.gate()
        upstream.script("short", Answer(text="one two three", gate=gate))
        streams = {}
        for number in range(10):
            model = "up/short" if number < 5 else "up/fault:hang_part_way"
            body = CALL | {"model": model, "stream": True}
            stream = stack.enter_context(gateway.stream("POST", "/v1/chat/completions", json_body=body))
            assert stream.status == 200
            lines = stream.lines()
            assert next(lines)
            streams[number] = (stream, lines)
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)

        def is_refused() -> bool:
            try:
                return gateway.get("/readyz", key="").status == 503
            except OSError:
                return True

        wait_for(is_refused, what="nothing new is accepted")
        gate.open()
        ends = {number: [line for line in lines if line][-1] for number, (_, lines) in streams.items()}
        assert {ends[number] for number in range(5)} == {"data: [DONE]"}
        for number in range(5, 10):
            assert json.loads(ends[number].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert gateway.process.wait(60) == 0
        assert time.monotonic() - began < 30, "long before the streams would have ended"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it_at_once(home: Path, workers: int) -> None:
    env = ENV | {"GATEWAY_SHUTDOWN_DRAIN_S": "60"}
    with running_gateway(home, env=env, key=KEY, command=serve(workers)) as gateway:
        pids = list(serving(gateway, 2).values()) if workers == 2 else []
        body = CALL | {"model": "up/fault:hang_part_way", "stream": True}
        with gateway.stream("POST", "/v1/chat/completions", json_body=body) as stream:
            assert next(stream.lines())
            gateway.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                gateway.process.wait(0.5)
            gateway.process.send_signal(signal.SIGTERM)
            gateway.process.wait(30)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the workers are gone")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_while_the_sdk_is_imported_ends_it_at_once(home: Path, workers: int) -> None:
    write_agent(home / "agents", "Late", "Help.")
    env = ENV | {"GATEWAY_LOG_LEVEL": "debug"}
    with running_gateway(home, env=env, key=KEY, command=serve(workers), ready=None) as gateway:
        gateway.logged("agent.preflight.started")
        family = descendants(gateway.process.pid)
        assert family
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(60) == 0
        assert time.monotonic() - began < 30
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), what="nobody is left")
        assert not gateway.log_events("agent.sdk.imported")
        assert "Traceback" not in gateway.log_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_reloads_without_dropping_a_stream(home: Path, upstream: ScriptedUpstream, workers: int) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(workers)) as gateway:
        if workers > 1:
            serving(gateway, workers)
        gate = upstream.gate()
        upstream.script("slow", Answer(text="one two", gate=gate))
        body = CALL | {"model": "up/slow", "stream": True}
        with gateway.stream("POST", "/v1/chat/completions", json_body=body) as stream:
            lines = stream.lines()
            assert next(lines)
            write_upstream(home, upstream, name="renamed")
            gateway.process.send_signal(signal.SIGHUP)
            moved = CALL | {"model": "renamed/m"}
            wait_for(
                lambda: {gateway.post("/v1/chat/completions", moved).status for _ in range(6)} == {200},
                what="every worker serves what the file says now",
            )
            gate.open()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_the_command_line_reaches_a_gateway_with_tls_and_shows_no_key_to_a_stranger(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority, _ = certificate(home)
    env = ENV | {"GATEWAY_TLS_CERT": str(authority), "GATEWAY_TLS_KEY": str(home / "key.pem")}
    with running_gateway(home, env=env, key=KEY, command=serve(1), ready=None) as gateway:
        here, elsewhere = (f"https://{host}:{gateway.port}" for host in ("127.0.0.1", "127.1"))
        wait_for(lambda: main(["health", "--url", here]) == 0, what="it serves")
        assert main(["list", "--url", here, "--key", KEY]) == 0
        assert main(["tools", "list", "--url", here, "--key", KEY]) == 0
        assert main(["health", "--url", here, "--key", KEY, "--providers"]) == 0
        assert main(["health", "--url", elsewhere]) == 0, "without a key it is only asked whether it serves"
        capsys.readouterr()
        for command in (["list"], ["tools", "list"], ["health", "--providers"]):
            assert main([*command, "--url", elsewhere, "--key", KEY]) == 1
            assert "certificate" in capsys.readouterr().err


def test_tls_and_its_certificate_can_be_replaced(home: Path) -> None:
    (home / "next").mkdir()
    authority, _ = certificate(home)
    replacement, _ = certificate(home / "next")
    env = ENV | {"GATEWAY_TLS_CERT": str(authority), "GATEWAY_TLS_KEY": str(home / "key.pem")}

    def get(trusted: Path) -> int:
        context = ssl.create_default_context(cafile=str(trusted))
        connection = http.client.HTTPSConnection("127.0.0.1", gateway.port, timeout=10, context=context)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            assert answer.getheader("strict-transport-security", "").startswith("max-age=")
            return answer.status
        finally:
            connection.close()

    with running_gateway(home, env=env, key=KEY, command=serve(2), ready=None) as gateway:
        serving(gateway, 2)
        saved = authority.read_bytes()
        assert get(authority) == 200
        shutil.copy(home / "next" / "key.pem", home / "key.pem")
        authority.write_bytes(replacement.read_bytes())
        gateway.process.send_signal(signal.SIGHUP)

        def is_replaced() -> bool:
            try:
                return all(get(replacement) == 200 for _ in range(6))
            except ssl.SSLError:
                return False

        wait_for(is_replaced, what="new connections are shown the new certificate")
        assert saved != authority.read_bytes()


def test_what_cannot_start_says_why_once_and_ends(home: Path) -> None:
    (home / "upstreams.yaml").write_text("version: 1\nupstreams: 3\n", encoding="utf-8")
    starting = running_gateway(home, env=ENV, key=KEY, command=serve(2), timeout_s=30)
    with pytest.raises(StartFailed, match=r"exit code 1"), starting:
        raise AssertionError("it started")
    text = (home / "gateway.log").read_text(encoding="utf-8")
    assert text.count("gateway: upstreams.yaml:2") == 1
    assert "Traceback" not in text


def test_a_supervisor_that_is_killed_takes_its_workers_along(home: Path) -> None:
    with running_gateway(home, env=ENV, key=KEY, command=serve(2)) as gateway:
        pids = serving(gateway, 2).values()
        gateway.process.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="nobody is left")


def test_a_list_that_is_asked_for_too_early_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_agent(home / "agents", "Slow", "Wait.", extra="import time\n\ntime.sleep(50)\n")
    env = ENV | {"GATEWAY_AGENT_IMPORT_TIMEOUT_S": "60"}
    with running_gateway(home, env=env, key=KEY, command=serve(1), ready="/health") as gateway:
        assert main(["list", "--url", gateway.url, "--key", KEY]) == 0
        assert "still loading its agents" in capsys.readouterr().out
