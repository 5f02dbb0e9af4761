"""Where calls may go: straight to the upstream, through nginx, through ours, through the gateways of others."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lab

PEERS = lab.ROOT / "build" / "peers"
MODELS = ("mock", "mock-t200-d5")

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
    """One way to the upstream.

    ``prefix`` comes before a model's name; ``pid`` None means that its CPU is not read. ``pace`` multiplies how many
    calls it is given, so that slow ones do not take all the time and quick ones use enough CPU to be read.
    """

    name: str
    port: int
    pid: int | None = None
    prefix: str = ""
    headers: tuple[str, ...] = ()
    pace: float = 1.0
    first_answer_s: float = 0.0

    def ask(self) -> bool:
        """Make one call; whether it succeeded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = dict(header.split(": ", 1) for header in self.headers)
            headers |= {"authorization": f"Bearer {lab.KEY}", "content-type": "application/json"}
            body = json.dumps(lab.chat(f"{self.prefix}mock"))
            connection.request("POST", "/v1/chat/completions", body, headers)
            return connection.getresponse().status == 200
        finally:
            connection.close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run; outside its turns it is stopped, so that its timers take nothing from the one measured."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for pid in () if self.pid is None else (self.pid, *lab.descendants(self.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def every_side(mock: int) -> Iterator[list[Side]]:
    """Start all that is installed; a peer that does not start is left out, and said to be."""
    with ExitStack() as stack:
        sides = [Side("direct", mock, pace=3)]
        for name, start in STARTS.items():
            try:
                side = stack.enter_context(start(mock))
            except Missing as missing:
                print(f"  {name} is left out: {missing}", flush=True)
            except (AssertionError, OSError) as error:
                if name == "gateway":
                    raise
                print(f"  {name} did not start: {error}", flush=True)
            else:
                sides.append(side)
                side._signal(signal.SIGSTOP)
                stack.callback(side._signal, signal.SIGCONT)  # or it could not be asked to end
        yield sides


class Missing(Exception):
    """What is not installed, and what installs it."""


@contextmanager
def _gateway(mock: int) -> Iterator[Side]:
    started = time.perf_counter()
    with lab.gateway(mock, {}, ready=None) as server:
        yield _answering(Side("gateway", server.port, server.process.pid, "mock/"), started)


@contextmanager
def _nginx(mock: int) -> Iterator[Side]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise Missing("nginx is not on PATH")
    with tempfile.TemporaryDirectory(prefix="nginx-bench-") as folder:
        port = lab.free_port()
        config = Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, mock=mock, port=port), encoding="utf-8")
        yield from _started([program, "-c", str(config)], Side("nginx", port, pace=3), {}, folder)


@contextmanager
def _litellm(mock: int) -> Iterator[Side]:
    program = PEERS / "litellm" / "bin" / "litellm"
    _require(program)
    with tempfile.TemporaryDirectory(prefix="litellm-bench-") as folder:
        base = f"http://127.0.0.1:{mock}/v1"
        rows = [
            {"model_name": model, "litellm_params": {"model": f"openai/{model}", "api_base": base, "api_key": "none"}}
            for model in MODELS
        ]
        config = Path(folder) / "config.yaml"
        general = {"model_list": rows, "general_settings": {"master_key": lab.KEY}}
        config.write_text(json.dumps(general), encoding="utf-8")
        port = lab.free_port()
        command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        yield from _started([*command, "--telemetry", "False"], Side("litellm", port, pace=0.05), env, folder)


@contextmanager
def _portkey(mock: int) -> Iterator[Side]:
    script = PEERS / "portkey" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    _require(script)
    node = shutil.which("node")
    if node is None:
        raise Missing("node is not on PATH")
    port = lab.free_port()
    headers = ("x-portkey-provider: openai", f"x-portkey-custom-host: http://127.0.0.1:{mock}/v1")
    with tempfile.TemporaryDirectory(prefix="portkey-bench-") as folder:
        side = Side("portkey", port, headers=headers, pace=0.25)
        command = [node, str(script), f"--port={port}", "--headless"]
        yield from _started(command, side, {"NODE_ENV": "production"}, folder)


def _started(command: list[str], side: Side, env: dict[str, str], folder: str) -> Iterator[Side]:
    started = time.perf_counter()
    inherited = {"PATH": os.environ.get("PATH", ""), "HOME": folder}
    with lab.process(command, env=inherited | env, cwd=folder) as pid:
        yield _answering(replace(side, pid=pid), started)


def _answering(side: Side, started: float) -> Side:
    lab.wait_for(lambda: lab.answers(side.ask), timeout_s=120, every_s=0.005, what=f"{side.name} answers")
    return replace(side, first_answer_s=time.perf_counter() - started)


def _require(file: Path) -> None:
    if not (PEERS / file.relative_to(PEERS).parts[0] / ".installed").is_file() or not file.is_file():
        raise Missing("`make bench-peers` installs it")


STARTS: dict[str, Any] = {"gateway": _gateway, "nginx": _nginx, "portkey": _portkey, "litellm": _litellm}
