"""Jails: made as root and not, with what is hidden empty, and gone whenever a call is given up."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
import uvloop

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.tools.builtin.jail import Jail, JailUnavailable, Job, Outcome
from gateway.tools.builtin.workspaces import Workspaces, folder_name
from gateway.tools.config import JailLimits, ShellTool
from tests.support.jails import needs_jail, processes_with


def job(command: str, *, seconds: float = 60, workspace: Path | None = None) -> Job:
    return Job(
        command=("/bin/sh", "-c", command),
        workspace=workspace,
        seconds=seconds,
        file_bytes=1_000_000,
        output_bytes=10_000,
    )


def run(jail: Jail, command: str) -> Outcome:
    return asyncio.run(jail.run(job(command)))


@needs_jail
@pytest.mark.parametrize(
    "uid", [pytest.param(0, marks=pytest.mark.skipif(os.geteuid() != 0, reason="for root alone")), 1_000]
)
def test_the_jail_is_the_same_for_root_and_for_others(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("CANARY", "canary-9e1c")
    jail = Jail(JailLimits(), hidden=[Path("/usr/share"), Path("/srv")])
    asyncio.run(jail.probe())
    outcome = run(jail, "id -u; grep CapBnd /proc/self/status; ls /usr/share; ls /srv; unshare --user true; touch /x")
    assert outcome.stdout.decode().split() == ["1000", "CapBnd:", "0000000000000000"]
    assert b"canary" not in run(jail, "cat /proc/[0-9]*/environ; env").stdout
    for words in (b"'/srv': No such file", b"unshare failed", b"Read-only file system"):
        assert words in outcome.stderr


@needs_jail
def test_processes_are_counted_although_root_makes_the_jail() -> None:
    outcome = run(Jail(JailLimits(processes=12)), "for i in $(seq 30); do sleep 600 & done")
    assert b"Cannot fork" in outcome.stderr


@needs_jail
def test_a_call_given_up_at_any_moment_leaves_nothing() -> None:
    """Also while bubblewrap starts, when its end would not yet take what it made along."""
    seconds = f"97{os.getpid()}1"

    async def give_up_at_every_moment() -> list[int]:
        jail = Jail(JailLimits())
        left: list[int] = []
        for moment in range(40):
            call = asyncio.create_task(jail.run(job(f"sleep {seconds}")))
            await asyncio.wait((call,), timeout=moment / 1_000)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            left += processes_with(seconds)
        return left

    assert asyncio.run(give_up_at_every_moment()) == []


@needs_jail
def test_when_a_call_has_ended_so_has_all_that_it_left_behind() -> None:
    """Not a moment later: bubblewrap itself ends before the kernel has ended the others."""
    seconds = f"97{os.getpid()}2"
    command = f"exec >&- 2>&-; for i in $(seq 20); do setsid sleep {seconds} & done; exit 4"

    async def many() -> list[int]:
        jail = Jail(JailLimits())
        left: list[int] = []
        for _ in range(50):
            outcome = await jail.run(job(command))
            left += processes_with(seconds)
            assert outcome.exit_code == 4
        return left

    assert asyncio.run(many()) == []


@needs_jail
def test_a_socket_that_may_be_inherited_is_not() -> None:
    """As a worker's listening socket may; uvloop's own subprocesses inherit it."""

    async def descriptors() -> list[bytes]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.set_inheritable(True)
            outcome = await Jail(JailLimits()).run(job("ls -l /proc/self/fd"))
        return [line.partition(b" -> ")[0].split()[-1] for line in outcome.stdout.splitlines() if b" -> " in line]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(descriptors()) == [b"0", b"1", b"2", b"3"]


@needs_jail
def test_no_descriptor_is_left_open() -> None:
    async def many() -> tuple[int, int]:
        jail = Jail(JailLimits())
        await jail.probe()
        before = len(os.listdir("/proc/self/fd"))
        await asyncio.gather(*(jail.run(job("exit 3")) for _ in range(5)))
        with pytest.raises(JailUnavailable):
            await jail.run(job("true", workspace=Path("/no/such/folder")))
        return before, len(os.listdir("/proc/self/fd"))

    before, after = asyncio.run(many())
    assert before == after


def test_no_two_keys_have_the_same_folder_and_none_leads_elsewhere() -> None:
    ids = ["chat", "Chat", "../chat", "chat/", "a" * 500, "", "shared", "ключ", "a\nb"]
    names = [folder_name(key) for key in ids]
    assert len(set(names)) == len(ids)
    assert all(len(name) < 64 and name.replace("-", "").isalnum() and name.isascii() for name in names)


@pytest.mark.parametrize(
    ("workspace", "words"),
    [
        ("/", "folders of the gateway"),
        ("{home}", "folders of the gateway"),
        ("{home}/state", "folders of the gateway"),
        ("{home}/link", "folders of the gateway"),
        ("{home}/agents/files", "run by the gateway"),
    ],
)
def test_a_workspace_that_shows_what_is_the_gateways_is_refused(tmp_path: Path, workspace: str, words: str) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    settings = Settings(agent_path=tmp_path / "agents", state_dir=tmp_path / "state")
    entry = ShellTool(name="shell", workspace=workspace.format(home=tmp_path))
    with pytest.raises(ConfigError, match=words):
        Workspaces(entry, settings)
    Workspaces(ShellTool(name="shell", workspace=str(tmp_path / "files")), settings)
