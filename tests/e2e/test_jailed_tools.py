"""`shell` and `file_ops`: what runs in the jail sees and reaches nothing but its workspace, and ends with its call."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import GatewayFactory
from tests.support.house import ADMIN, CHAT, furnish, write_agent
from tests.support.http import Response
from tests.support.jails import needs_jail, processes_with
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

CANARY = "canary-of-the-gateways-environment-1f7d"
_MARKS = itertools.count(1)

TOOLS = """\
version: 1
defaults: {timeout: 60}
tools:
  - {name: shell, provider: shell}
  - {name: files, provider: file_ops}
  - {name: hurried, provider: shell, timeout: 3}
  - {name: patient, provider: shell, timeout: 600}
  - name: small
    provider: shell
    timeout: 20
    workspace: small
    max_workspace_bytes: 1000000
    max_workspace_files: 50
    limits: {tmp_bytes: 1000000, memory_bytes: 200000000, cpu_seconds: 2, processes: 16, open_files: 32}
  - {name: small_files, provider: file_ops, workspace: small, max_workspace_bytes: 1000000, max_workspace_files: 50}
  - {name: team, provider: shell, workspace: team, shared: true}
  - {name: team_files, provider: file_ops, workspace: team, shared: true}
  - {name: brief, provider: file_ops, max_result_bytes: 2048}
  - {name: ruled, provider: file_ops, rules: [{argument: operation, enum: [read, list]}]}
"""

AGENT = """\
from sdk_adapter.gateway_tools import gateway_tool

USED = ["shell", "files", "patient"]
"""


def prepare(home: Path, tools: str = TOOLS) -> None:
    (home / "tools.yaml").write_text(tools, encoding="utf-8")
    security = (home / "security.yaml").read_text(encoding="utf-8")
    for key in ("admin", "chat"):
        security = security.replace(f"  - id: {key}\n", f'  - id: {key}\n    allow_tools: ["*"]\n')
    (home / "security.yaml").write_text(security, encoding="utf-8")


def env_of(home: Path, **more: str) -> dict[str, str]:
    return {"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"), "CANARY": CANARY, **more}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("jails")
    furnish(home, upstream.url)
    prepare(home)
    write_agent(home / "agents", "Handyman", "You are handy.", extra=AGENT, tools="*map(gateway_tool, USED)")
    env = env_of(home, GATEWAY_STREAM_PING_S="1")  # how soon a run learns that its client has left
    with running_gateway(home, env=env, key=ADMIN, cwd=home) as server:
        yield server


def invoke(gateway: Gateway, name: str, key: str = CHAT, **arguments: Any) -> Response:
    return gateway.request("POST", f"/tools/{name}/invoke", json_body={"arguments": arguments}, key=key, timeout_s=120)


def said(answer: Response) -> dict[str, Any]:
    """What the tool says; its own errors are the same JSON, as a text."""
    assert answer.status == 200, answer.body
    body = answer.json()
    value: dict[str, Any] = json.loads(body["error"]) if body["error"] is not None else body["result"]
    return value


def sh(gateway: Gateway, command: str, *, tool: str = "shell", key: str = CHAT, **more: Any) -> dict[str, Any]:
    return said(invoke(gateway, tool, key, command=command, **more))


def files(gateway: Gateway, operation: str, *, tool: str = "files", key: str = CHAT, **more: Any) -> dict[str, Any]:
    return said(invoke(gateway, tool, key, operation=operation, **more))


def mark() -> str:
    """A number of seconds to sleep that no other process on the machine sleeps."""
    return f"98{os.getpid()}{next(_MARKS)}"


@contextlib.contextmanager
def listening_canary(family: int, address: Any) -> Iterator[tuple[Any, list[str]]]:
    """A server that tells what came to it."""
    visits: list[str] = []
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as visitor:
                        visits.append(visitor.recv(100).decode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname(), visits
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@needs_jail
def test_a_command_runs_and_says_everything_about_itself(house: Gateway) -> None:
    assert sh(house, "cat; echo wrong >&2; exit 3", stdin="söme\n") == {
        "exit_code": 3,
        "stdout": "söme\n",
        "stderr": "wrong\n",
        "truncated": False,
        "timed_out": False,
        "stopped": None,
    }
    assert sh(house, "kill -9 $$")["exit_code"] == 137
    assert sh(house, "pwd; echo $HOME; id -u")["stdout"] == "/workspace\n/workspace\n1000\n"
    (listed,) = [tool for tool in house.get("/tools").json()["data"] if tool["name"] == "shell"]
    assert (listed["provider"], listed["status"], listed["health"]["status"]) == ("shell", "ready", "ok")
    assert not listed["idempotent"] and not listed["read_only"]


@needs_jail
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cat /etc/shadow", "No such file"),
        ("cat /etc/passwd", "No such file"),
        ("ls /home", "No such file"),
        ("ls {home}", "No such file"),
        ("cat {home}/security.yaml", "No such file"),
        ("ls {home}/state", "No such file"),
        ("ls {home}/agents", "No such file"),
        ("touch /usr/bin/new", "Read-only file system"),
        ("touch /new", "Read-only file system"),
        ("touch /dev/new", "Read-only file system"),
        ("echo x > /proc/sys/kernel/hostname", "Read-only file system|Permission denied"),
        ("echo x > /proc/sysrq-trigger", "Read-only file system|nonexistent"),
        ("ln -s /etc/shadow out; cat out", "No such file"),
        ("ln -sf {home}/security.yaml out; cat out", "No such file"),
        ("ln -sfn / out; cat out/etc/shadow", "No such file"),
        ("cat /proc/1/environ", "Permission denied|^$"),
        ("ls /proc/1/root/home", "Permission denied|No such file"),
        ("ls /proc/{pid}/", "No such file"),
        ("kill -9 {pid}", "No such process"),
        ("kill -9 1; kill -0 1", "not permitted|^$"),
        ("nsenter -t 1 -m -u -n ls", "Permission denied|not permitted"),
        ("unshare --user true", "unshare failed"),
        ("unshare --mount true", "unshare failed"),
        ("mount -t tmpfs none /tmp", "must be superuser|permission denied"),
        ("umount /usr", "must be superuser|umount failed"),
        ("mknod disk b 254 0", "not permitted"),
        ("chown 0 .", "not permitted|Invalid argument"),
        ("bash -c 'ulimit -n 100000'", "cannot modify limit"),
        ("bash -c 'ulimit -u 100000'", "cannot modify limit"),
        ("sudo -n id || su -c id", "not found|No such file|must be|not be|root|Authentication"),
    ],
)
def test_what_is_not_the_callers_is_out_of_reach(house: Gateway, command: str, words: str) -> None:
    result = sh(house, command.format(home=house.home, pid=house.process.pid))
    assert any(word in result["stderr"] or (word == "^$" and not result["stderr"]) for word in words.split("|")), result
    assert CANARY not in json.dumps(result)
    assert result["exit_code"] != 0 or "^$" in words, result
    assert house.get("/health", key="").status == 200


@needs_jail
def test_nothing_of_the_gateway_is_handed_in(house: Gateway) -> None:
    """No variable, no descriptor (a listening socket among them), no right, no other process, no interface."""
    everything = sh(house, "env; cat /proc/[0-9]*/environ; cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert CANARY not in everything["stdout"] and "GATEWAY_" not in everything["stdout"]
    assert sorted(sh(house, "env | cut -d= -f1")["stdout"].split()) == ["HOME", "LANG", "PATH", "PWD", "TMPDIR"]
    assert sh(house, "for f in /proc/self/fd/*; do echo ${f##*/}; done")["stdout"].split()[:4] in (
        ["0", "1", "2", "3"],  # 3 is the shell's own, which reads the folder
        ["0", "1", "2"],
    )
    status = sh(house, "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status")["stdout"].split()
    assert status[1::2] == ["0000000000000000"] * 5 + ["1"]
    pids = [int(name) for name in sh(house, "ls /proc | grep -E '^[0-9]+$'")["stdout"].split()]
    assert len(pids) < 12 and max(pids) < 100
    assert sh(house, "tail -n +3 /proc/net/dev | cut -d: -f1")["stdout"].split() == ["lo"]
    assert sh(house, "cat /proc/self/oom_score_adj")["stdout"] == "1000\n"


@needs_jail
def test_no_network_not_even_the_machines_own(house: Gateway) -> None:
    with listening_canary(socket.AF_INET, ("127.0.0.1", 0)) as ((_, port), visits):
        command = f"echo hello > /dev/tcp/127.0.0.1/{port}"
        subprocess.run(["bash", "-c", command], check=True)
        wait_for(lambda: visits == ["hello\n"], what="the canary hears whoever reaches it")
        result = sh(house, f"bash -c {shlex.quote(command)}")
        assert result["exit_code"] != 0 and "Connection refused" in result["stderr"]
        assert sh(house, f"bash -c 'echo hello > /dev/tcp/127.0.0.1/{house.port}'")["exit_code"] != 0
        assert "unreachable" in sh(house, "bash -c 'echo hello > /dev/tcp/192.0.2.1/80'")["stderr"]
        assert visits == ["hello\n"]


@needs_jail
@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="the jail shows no Python of the system's")
def test_an_abstract_socket_of_the_machine_is_out_of_reach(house: Gateway) -> None:
    name = f"gateway-canary-{os.getpid()}"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + {name!r}); s.send(b'hello')"
    with listening_canary(socket.AF_UNIX, "\0" + name) as (_, visits):
        subprocess.run(["/usr/bin/python3", "-c", code], check=True)
        wait_for(lambda: visits == ["hello"], what="the canary hears whoever reaches it")
        result = sh(house, f"/usr/bin/python3 -c {shlex.quote(code)}")
        assert "Connection" in result["stderr"] and visits == ["hello"]


@needs_jail
@pytest.mark.parametrize(
    ("command", "holds"),
    [
        ("bomb() { bomb | bomb & }; bomb; sleep 600", lambda it: "Cannot fork" in it["stderr"] or it["timed_out"]),
        ("while :; do sleep 600 & done", lambda it: "Cannot fork" in it["stderr"]),
        ("yes", lambda it: it["truncated"] and "nobody reads" in it["stopped"]),
        ("yes >&2", lambda it: it["truncated"] and "nobody reads" in it["stopped"]),
        ("head -c 2000000 /dev/zero", lambda it: it["truncated"] and it["exit_code"] == 0),
        ("yes > big", lambda it: it["exit_code"] == 153),
        (
            "i=0; while :; do i=$((i+1)); head -c 400000 /dev/zero > part$i; done",
            lambda it: it["stopped"] is not None and "1,000,000 bytes" in it["stopped"],
        ),
        (
            "i=0; while :; do i=$((i+1)); : > part$i; done",
            lambda it: it["stopped"] is not None and "50 files" in it["stopped"],
        ),
        ("for i in 1 2 3; do head -c 400000 /dev/zero > /tmp/$i || exit 9; done", lambda it: it["exit_code"] == 9),
        ("for i in 1 2 3; do head -c 400000 /dev/zero > /dev/shm/$i || exit 9; done", lambda it: it["exit_code"] == 9),
        ("head -c 900000000 /dev/zero | tail", lambda it: "memory exhausted" in it["stderr"]),
        ("while :; do :; done", lambda it: it["exit_code"] == 137),
        ("exec 40>x", lambda it: it["exit_code"] != 0),
    ],
)
def test_a_bomb_hurts_nobody(house: Gateway, command: str, holds: Any) -> None:
    sh(house, "chmod -R u+rwx .; find . -mindepth 1 -delete", tool="small")
    name = mark()
    result = sh(house, f": {name}; {command}", tool="small")
    assert holds(result), {**result, "stdout": result["stdout"][:100]}
    assert processes_with(name) == []
    assert house.get("/health", key="").status == 200
    assert sh(house, "echo fine", tool="small")["stdout"] == "fine\n"


@needs_jail
def test_a_full_workspace_takes_no_more_until_something_is_deleted(house: Gateway) -> None:
    sh(house, "chmod -R u+rwx .; find . -mindepth 1 -delete", tool="small")
    assert sh(house, "head -c 999000 /dev/zero > full", tool="small")["exit_code"] == 0
    assert sh(house, "head -c 5000 /dev/zero > more", tool="small")["exit_code"] == 153
    refused = files(house, "write", tool="small_files", path="note.txt", content="x" * 5_000)
    assert refused["error"]["code"] == "workspace_full" and "1,000,000 bytes" in refused["error"]["message"]
    sh(house, "mkdir dark; chmod 0 dark", tool="small")
    assert files(house, "delete", tool="small_files", path="dark", recursive=True) == {"path": "dark", "deleted": True}
    assert files(house, "delete", tool="small_files", path="full")["deleted"]
    assert files(house, "write", tool="small_files", path="note.txt", content="x" * 5_000)["size"] == 5_000


@needs_jail
def test_no_folder_is_too_dark_or_too_deep_to_be_counted_and_deleted(house: Gateway) -> None:
    clean = "chmod -R u+rwx .; find . -mindepth 1 -delete"
    sh(house, clean, tool="small")
    dark = "mkdir dark; echo x > dark/x; chmod 0 dark; sleep 1"
    assert sh(house, dark, tool="small")["exit_code"] in (0, None)  # stopped where the gateway cannot look into it
    if os.geteuid() != 0:  # root can look into it as it is
        assert sh(house, "cat dark/x", tool="small")["stdout"] == "x\n"
    sh(house, clean, tool="small")
    deep = f"mkdir deep; cd deep; for i in $(seq 25); do mkdir {'d' * 250}; cd {'d' * 250}; done; sleep 1"
    result = sh(house, deep, tool="small")
    assert result["stopped"] and "cannot be looked into" in result["stopped"]
    again = sh(house, "echo ran", tool="small")
    assert (again["exit_code"], again["stdout"]) == (None, "") and again["stopped"].startswith("Not begun")
    assert files(house, "write", tool="small_files", path="x", content="x")["error"]["code"] == "workspace_full"
    assert files(house, "delete", tool="small_files", path="deep", recursive=True)["deleted"]
    assert sh(house, "echo ran", tool="small")["stdout"] == "ran\n"


@needs_jail
def test_a_command_past_its_time_is_ended_with_all_it_started(house: Gateway) -> None:
    name = mark()
    result = sh(house, f"echo begun; setsid sleep {name} >/dev/null 2>&1 & sleep {name}; echo never", tool="hurried")
    assert (result["timed_out"], result["exit_code"], result["stdout"]) == (True, None, "begun\n")
    assert result["stopped"].startswith("Stopped after")
    assert processes_with(name) == []
    (line,) = house.logged("tool.invoke", tool_name="hurried", status="error")
    assert line["provider"] == "shell"


@needs_jail
def test_what_a_command_leaves_behind_ends_with_it(house: Gateway) -> None:
    name = mark()
    assert sh(house, f"setsid nohup sleep {name} >/dev/null 2>&1 & exit 0")["exit_code"] == 0
    assert processes_with(name) == []
    assert sh(house, f"exec >&- 2>&-; (setsid sleep {name} &) ; exit 4")["exit_code"] == 4
    assert processes_with(name) == []


@needs_jail
def test_a_client_that_leaves_takes_the_command_of_its_run_along(house: Gateway) -> None:
    name = mark()
    call = f'call patient {{"command":"setsid sleep {name} & sleep {name}"}}'
    body = {"model": "default/handyman", "stream": True, "messages": [{"role": "user", "content": call}]}
    with house.stream("POST", "/v1/chat/completions", json_body=body, key=CHAT) as stream:
        assert stream.status == 200
        wait_for(lambda: len(processes_with(name)) >= 2, what="the command runs")
    wait_for(lambda: processes_with(name) == [], what="nothing of it is left")


@needs_jail
def test_a_killed_gateway_leaves_no_command_behind(start: GatewayFactory, tmp_path: Path) -> None:
    home = tmp_path / "home"
    gateway = start(prepare=prepare, env=env_of(home), home=home, cwd=tmp_path)
    name = mark()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(invoke, gateway, "patient", command=f"setsid sleep {name} & trap '' TERM HUP; sleep {name}")
        wait_for(lambda: len(processes_with(name)) >= 2, what="the command runs")
        gateway.process.send_signal(signal.SIGKILL)
        gateway.process.wait()
        wait_for(lambda: processes_with(name) == [], what="nothing of it is left")
        assert call.exception(60) is not None


@needs_jail
def test_callers_do_not_see_each_other_and_shared_is_shared(house: Gateway) -> None:
    sh(house, "echo mine > private.txt", key=CHAT)
    assert "private.txt" not in sh(house, "find / -name private.txt 2>/dev/null", key=ADMIN)["stdout"]
    assert files(house, "read", path="private.txt", key=ADMIN)["error"]["code"] == "not_found"
    assert files(house, "read", path="private.txt", key=CHAT)["content"] == "mine\n"
    sh(house, "echo ours > common.txt", tool="team", key=CHAT)
    assert files(house, "read", tool="team_files", path="common.txt", key=ADMIN)["content"] == "ours\n"
    assert (house.home / "team" / "common.txt").read_text() == "ours\n"
    kept = sorted((house.home / "state" / "workspaces").iterdir())
    assert [path.name.rpartition("-")[0] for path in kept] == ["admin", "chat"]
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in kept)


@needs_jail
def test_file_operations(house: Gateway) -> None:
    assert files(house, "mkdir", path="notes/old") == {"path": "notes/old", "type": "folder"}
    assert files(house, "write", path="notes/a.txt", content="eins\nzwei ä\n") == {"path": "notes/a.txt", "size": 13}
    assert files(house, "append", path="/workspace/notes/a.txt", content="drei\n")["size"] == 18
    assert files(house, "append", path="notes/new/b.md", content="zwei b\n")["size"] == 7
    assert files(house, "read", path="./notes/a.txt") == {
        "path": "notes/a.txt",
        "content": "eins\nzwei ä\ndrei\n",
        "size": 18,
        "offset": 0,
        "truncated": False,
    }
    part = files(house, "read", path="notes/a.txt", offset=5, limit=6)
    assert (part["content"], part["truncated"], part["next_offset"]) == ("zwei ", True, 10)  # no half of an ä
    assert files(house, "read", path="notes/a.txt", offset=part["next_offset"])["content"] == "ä\ndrei\n"
    assert files(house, "read", path="notes/a.txt", offset=11)["content"] == "\ndrei\n"
    assert files(house, "search", path="notes", text="zwei") == {
        "matches": [
            {"path": "notes/a.txt", "line": 2, "text": "zwei ä"},
            {"path": "notes/new/b.md", "line": 1, "text": "zwei b"},
        ],
        "truncated": False,
    }
    assert files(house, "search", glob="*.md") == {"matches": [{"path": "notes/new/b.md"}], "truncated": False}
    listing = files(house, "list", path="notes")
    assert [(entry["path"], entry["type"]) for entry in listing["entries"]] == [
        ("notes/a.txt", "file"),
        ("notes/new", "folder"),
        ("notes/old", "folder"),
    ]
    assert files(house, "stat", path="notes/a.txt")["size"] == 18
    assert files(house, "move", path="notes/a.txt", to="notes/c.txt") == {"path": "notes/a.txt", "to": "notes/c.txt"}
    assert files(house, "delete", path="notes/c.txt") == {"path": "notes/c.txt", "deleted": True}
    assert files(house, "delete", path="notes", recursive=True)["deleted"]
    assert files(house, "stat", path="notes")["error"]["code"] == "not_found"


@needs_jail
def test_file_operations_that_are_refused_say_why(house: Gateway) -> None:
    sh(
        house,
        "rm -rf t; mkdir -p t/full; echo x > t/full/x; echo x > t/a; echo y > t/b; printf 'a\\0b' > t/nul; "
        "printf 'a\\377b' > t/latin; mkfifo t/pipe; ln -s /usr/bin/env t/out; ln -s /usr t/usr; ln -s loop t/loop; "
        f"ln -s {shlex.quote(str(house.home))}/security.yaml t/secret",
    )
    table = [
        ({"operation": "read", "path": "t/none"}, "not_found"),
        ({"operation": "read", "path": "t"}, "is_a_folder"),
        ({"operation": "read", "path": "t/a/b"}, "not_a_folder"),
        ({"operation": "read", "path": "t/nul"}, "binary"),
        ({"operation": "read", "path": "t/latin"}, "binary"),
        ({"operation": "read", "path": "t/pipe"}, "not_a_file"),
        ({"operation": "append", "path": "t/pipe", "content": "x"}, "not_a_file"),
        ({"operation": "read", "path": "t/out"}, "outside"),
        ({"operation": "write", "path": "t/out", "content": "x"}, "outside"),
        ({"operation": "read", "path": "t/secret"}, "outside"),
        ({"operation": "list", "path": "t/usr"}, "outside"),
        ({"operation": "read", "path": "t/loop"}, "link_loop"),
        ({"operation": "read", "path": "/etc/shadow"}, "outside"),
        ({"operation": "read", "path": "../etc/shadow"}, "outside"),
        ({"operation": "write", "path": "/tmp/x", "content": "x"}, "outside"),
        ({"operation": "move", "path": "t/a", "to": "/tmp/x"}, "outside"),
        ({"operation": "move", "path": "t/a", "to": "t/b"}, "exists"),
        ({"operation": "move", "path": "t", "to": "t/full/t"}, "invalid_path"),
        ({"operation": "delete", "path": "t/full"}, "not_empty"),
        ({"operation": "delete", "path": "."}, "invalid_path"),
        ({"operation": "write", "path": "t", "content": "x"}, "is_a_folder"),
        ({"operation": "mkdir", "path": "t/a"}, "exists"),
        ({"operation": "search", "path": "t/none", "text": "x"}, "not_found"),
        ({"operation": "read", "path": "x" * 300}, "path_too_long"),
        ({"operation": "read", "path": "a\0b"}, "invalid_path"),
    ]
    wrong = [
        (arguments, result)
        for arguments, code in table
        if (result := files(house, **arguments)).get("error", {}).get("code") != code
    ]
    assert wrong == []
    assert files(house, "move", path="t/a", to="t/b", overwrite=True)["to"] == "t/b"
    assert files(house, "delete", path="t/out")["deleted"] and Path("/usr/bin/env").exists()
    answer = invoke(house, "files", operation="write", path="x")
    assert answer.status == 400 and "arguments.content: 'write' needs it" in answer.error["message"]
    assert invoke(house, "files", operation="format").status == 400
    assert invoke(house, "ruled", operation="delete", path="t").status == 403
    assert invoke(house, "shell", command="a\0b").status == 400


@needs_jail
def test_answers_are_bounded_and_go_on_where_they_ended(house: Gateway) -> None:
    text = "".join(f"{number} ä\n" for number in range(2_000))
    files(house, "write", path="long.txt", content=text)
    found, offset = "", 0
    while True:
        answer = invoke(house, "brief", operation="read", path="long.txt", offset=offset)
        assert len(json.dumps(answer.json()["result"], ensure_ascii=False, separators=(",", ":")).encode()) <= 2_048
        part = said(answer)
        found += part["content"]
        if not part["truncated"]:
            break
        offset = part["next_offset"]
    assert found == text
    assert files(house, "search", tool="brief", text="ä")["truncated"]
    sh(house, "mkdir -p many; cd many; for i in $(seq 100); do : > file$i; done")
    assert files(house, "list", tool="brief", path="many")["error"]["code"] == "too_large"
    control = sh(house, "head -c 200000 /dev/zero")
    assert control["truncated"] and set(control["stdout"]) == {"\0"}


@needs_jail
def test_an_agent_works_in_the_jail_of_its_caller(house: Gateway) -> None:
    def ask(text: str, key: str) -> dict[str, Any]:
        with OpenAI(api_key=key, base_url=f"{house.url}/v1", max_retries=0) as client:
            said = client.chat.completions.create(
                model="default/handyman", messages=[{"role": "user", "content": f"call {text} ;; echo"}]
            )
        value: dict[str, Any] = json.loads(said.choices[0].message.content or "")
        return value

    assert ask('shell {"command":"echo made > by-agent.txt; cat by-agent.txt"}', CHAT)["stdout"] == "made\n"
    assert ask('files {"operation":"read","path":"by-agent.txt"}', CHAT)["content"] == "made\n"
    assert ask('files {"operation":"read","path":"by-agent.txt"}', ADMIN)["error"]["code"] == "not_found"


@needs_jail
def test_calls_run_side_by_side(house: Gateway) -> None:
    """Each waits for all others to have begun."""
    command = "touch here-$$-$N; while [ $(ls here-* | wc -l) -lt 4 ]; do sleep 0.05; done; echo met"
    sh(house, "rm -f here-*")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: sh(house, f"N={n}; {command}"), range(4)))
    assert [result["stdout"] for result in results] == ["met\n"] * 4


def test_without_bubblewrap_the_entry_says_what_to_install_and_nothing_runs(
    start: GatewayFactory, tmp_path: Path
) -> None:
    home, programs = tmp_path / "home", tmp_path / "programs"
    programs.mkdir()
    gateway = start(prepare=prepare, env=env_of(home, PATH=str(programs)), home=home, cwd=tmp_path)
    answer = invoke(gateway, "shell", command=f"touch {home}/ran")
    assert answer.status == 503 and answer.error["code"] == "tool_unavailable"
    assert "Install the package 'bubblewrap'" in answer.error["message"]
    assert invoke(gateway, "files", operation="write", path="x", content="x").status == 503
    (listed,) = [tool for tool in gateway.get("/tools").json()["data"] if tool["name"] == "shell"]
    assert listed["status"] == "unavailable" and "bubblewrap" in listed["problem"]
    gateway.logged("tool.jail.refused", tool_name="shell")
    assert not (home / "ran").exists()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
def test_where_the_kernel_refuses_a_jail_nothing_runs_either(start: GatewayFactory, tmp_path: Path) -> None:
    """A bubblewrap that fails as it does where user namespaces are forbidden, then one that works at first."""
    home, programs = tmp_path / "home", tmp_path / "programs"
    programs.mkdir()
    fake = programs / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    gateway = start(prepare=prepare, env=env_of(home, PATH=path), home=home, cwd=tmp_path)
    answer = invoke(gateway, "shell", command=f"touch {home}/ran")
    assert answer.status == 503 and "most often user namespaces are not allowed" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    (line, *_) = gateway.logged("tool.jail.refused", tool_name="shell")
    assert line["details"] == "bwrap: No permissions to create new namespace\n"
    assert not (home / "ran").exists()
