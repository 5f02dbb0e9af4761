"""The real gateway as a child process on a socket: started, waited for, read, stopped without leftovers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.http import HttpClient
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
_LIBC = ctypes.CDLL(None)
_MARKS = itertools.count()
_PORTS = os.open(Path(tempfile.gettempdir()) / f"agent-gateway-test-ports-{os.getuid()}", os.O_CREAT | os.O_RDWR, 0o600)
_TAKEN: set[int] = set()
UVICORN = ("-m", "uvicorn", "api.main:app", "--host", "127.0.0.1", "--no-access-log", "--port")


class Gateway(HttpClient):
    """A running gateway. ``agents`` is its drop-in folder, ``home`` holds its configuration and its log.

    ``log_begins`` is where its lines begin in a log that an earlier one of the same home has written to.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, home: Path, key: str | None, *, log_begins: int = 0
    ) -> None:
        super().__init__(port, key=key)
        self.process = process
        self.home = home
        self.agents = home / "agents"
        self.url = f"http://127.0.0.1:{port}"
        self._log_begins = self._log_read = log_begins
        self._lines: list[dict[str, Any]] = []

    def logged(
        self, event: str, *, count: int = 1, where: Callable[[dict[str, Any]], object] | None = None, **fields: Any
    ) -> list[dict[str, Any]]:
        """Wait until the log has ``count`` lines of an event with these fields; return all of them, oldest first.

        A line about a request is written after its answer has left: whoever expects one waits for it here.
        """

        def found() -> list[dict[str, Any]]:
            lines = [line for line in self._written_lines() if line.get("event") == event]
            lines = [line for line in lines if all(line.get(name) == value for name, value in fields.items())]
            return [line for line in lines if where is None or where(line)]

        try:
            wait_for(lambda: len(found()) >= count, what=f"{count} of {event} {fields or ''} in the log")
        except AssertionError as error:
            raise AssertionError(f"{error}; the log ends:\n" + "\n".join(self._written().splitlines()[-40:])) from None
        return found()

    def log_text(self) -> str:
        """Everything the process has to say of what was so far; a running one is asked, so that nothing is on its way.

        One that has several workers answers by one of them: for the lines of the others there is `logged`.
        """
        if self.process.poll() is None:
            mark = f"log-{os.getpid()}-{next(_MARKS)}"
            self.get("/health", key="", headers={"x-request-id": mark})
            self.logged("http.request", request_id=mark)
        return self._written()

    def log_lines(self) -> list[dict[str, Any]]:
        """The JSON lines of `log_text`. The server's own greeting, written before the product is asked, is none."""
        self.log_text()
        return self._written_lines()

    def log_events(self, event: str) -> list[dict[str, Any]]:
        """The lines of one event in `log_text`: to tell how many there are, or that there is none."""
        return [line for line in self.log_lines() if line.get("event") == event]

    def _written(self) -> str:
        with (self.home / "gateway.log").open("rb") as log:
            log.seek(self._log_begins)
            return log.read().decode("utf-8", "replace")

    def _written_lines(self) -> list[dict[str, Any]]:
        with (self.home / "gateway.log").open("rb") as log:
            log.seek(self._log_read)
            whole = log.read().rpartition(b"\n")[0]  # a line without its end is still being written
        if whole:
            self._log_read += len(whole) + 1
            self._lines += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        return self._lines

    def listing(self) -> dict[str, dict[str, Any]]:
        """``GET /agents`` by qualified name."""
        answer = self.get("/agents")
        assert answer.status == 200, answer.body
        return {entry["qualified_name"]: entry for entry in answer.json()}

    def counted(self, metric: str) -> dict[str, float]:
        """The samples of a counter (``agent_gateway_…`` without ``_total``) by their labels, as they are written."""
        text = self.get("/metrics/prometheus").body.decode()
        found = re.findall(rf"^{re.escape(metric)}_total{{(.*)}} (\S+)$", text, re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    def model_ids(self, **options: Any) -> set[str]:
        """The ids of ``GET /v1/models``."""
        answer = self.get("/v1/models", **options)
        assert answer.status == 200, answer.body
        return {model["id"] for model in answer.json()["data"]}

    def rss_mb(self) -> float:
        """Resident memory of the serving process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


class StartFailed(Exception):
    """The process ended before it served; the text is its log."""


@contextmanager
def running_gateway(
    home: Path,
    *,
    env: Mapping[str, str] | None = None,
    key: str | None = None,
    command: Sequence[str] = UVICORN,
    cwd: Path | None = None,
    ready: str | None = "/readyz",
    timeout_s: float = 120.0,
) -> Iterator[Gateway]:
    """Start a gateway whose drop-in folder is ``home/agents``; stop it and everything it started on leaving.

    ``command`` is what follows ``python``; the port is appended. ``ready`` is the path that must answer 200 first;
    None waits only until the port accepts. Raises `StartFailed` when the process ends instead.
    """
    (home / "agents").mkdir(parents=True, exist_ok=True)
    port = free_port()
    with (home / "gateway.log").open("ab") as log:
        log_begins = log.tell()
        process = subprocess.Popen(
            [sys.executable, *command, str(port)],
            cwd=cwd or home,
            env=_environment(home, env or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if threading.current_thread() is threading.main_thread() else None,
        )
    gateway = Gateway(process, port, home, key, log_begins=log_begins)
    try:
        wait_for(lambda: _serves(gateway, ready), timeout_s=timeout_s, what=f"the gateway serves {ready or 'its port'}")
        yield gateway
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], *, timeout_s: float = 60.0) -> None:
    """End a process and every descendant; fail if it did not go by itself."""
    family = descendants(process.pid)
    graceful = True
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            graceful = False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = [pid for pid in family if _alive(pid)]
    try:
        wait_for(lambda: not any(map(_alive, left)), what="the gateway's children are gone")
    finally:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    assert graceful, f"the gateway did not stop within {timeout_s:g} s of SIGTERM"


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def free_port() -> int:
    """A port that nobody listens on and no other test process was given.

    It is outside the range that outgoing connections take theirs from. That it is taken is a lock on one byte of a
    file that all test runs of this user share; it ends with this process.
    """
    while True:
        port = random.randrange(18_000, 31_000)
        if port in _TAKEN:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            fcntl.lockf(_PORTS, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            _TAKEN.add(port)
            probe.bind(("127.0.0.1", port))
            return port


def _end_with_parent() -> None:
    """In the child: have the kernel end it when the tests are killed, which a session of its own would survive."""
    _LIBC.prctl(1, signal.SIGKILL)


def _environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "SYSTEMROOT") if name in os.environ}
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    own = {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GATEWAY_AGENT_DISCOVERY_PATH": str(home / "agents"),
        "GATEWAY_STATE_DIR": str(home / "state"),
    }
    for name in ("upstreams", "security", "agents", "routing"):
        if (home / f"{name}.yaml").is_file():
            own[f"GATEWAY_{name.rstrip('s').upper()}_CONFIG"] = str(home / f"{name}.yaml")
    return inherited | coverage | own | dict(extra)


def _serves(gateway: Gateway, path: str | None) -> bool:
    if gateway.process.poll() is not None:
        lines = [line for line in gateway.log_text().splitlines() if '"event":"http.request"' not in line]
        raise StartFailed("\n".join([f"exit code {gateway.process.returncode}", *lines[-200:]]))
    try:
        if path is None:
            with socket.create_connection(("127.0.0.1", gateway.port), 1):
                return True
        return gateway.get(path, timeout_s=5).status == 200
    except (OSError, http.client.HTTPException):
        return False


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
