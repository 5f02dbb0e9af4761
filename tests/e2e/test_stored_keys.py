"""Keys made at run time, by HTTP and in a terminal: the same in every process, gone within a second of their end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.support.databases import BACKENDS, POSTGRES, database
from tests.support.house import ADMIN, CHAT, SECURITY
from tests.support.scripted_answers import Answer
from tests.support.scripted_upstream import ScriptedUpstream, fault
from tests.support.server import ROOT, Gateway, running_gateway
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for

UPSTREAMS = "version: 1\nupstreams:\n  - {{name: up, base_url: {url}, models: [m, n], default_model: m}}\n"
PATIENT = {"GATEWAY_KEY_FAILURES_PER_MINUTE": "100000"}
"""A test that waits for a 401 guesses keys faster than anybody should."""
LONG_BEFORE_A_DEADLINE_S = 20.0
"""What a busy machine may make of one second."""


@dataclass
class House:
    folder: Path
    env: dict[str, str]
    upstream: ScriptedUpstream

    def ask(self, gateway: Gateway, key: str) -> int:
        self.upstream.enqueue(Answer(text="Hi."))
        body = {"model": "up/m", "messages": [{"role": "user", "content": "Hello"}]}
        return gateway.post("/v1/chat/completions", body, key=key).status

    def lets_in(self, gateway: Gateway, key: str) -> int:
        return gateway.get("/v1/models", key=key).status


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, ScriptedUpstream]]:
    with ScriptedUpstream() as upstream:
        (tmp_path / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
        (tmp_path / "upstreams.yaml").write_text(UPSTREAMS.format(url=upstream.base_url), encoding="utf-8")
        (tmp_path / "security.yaml").write_text(SECURITY.replace("HIDE", "false"), encoding="utf-8")
        yield tmp_path, upstream


@pytest.fixture(params=BACKENDS)
def house(request: pytest.FixtureRequest, folder: tuple[Path, ScriptedUpstream]) -> Iterator[House]:
    home, upstream = folder
    with database(request.param, home) as url:
        yield House(home, {"GATEWAY_DATABASE_URL": url} | PATIENT, upstream)


def make(gateway: Gateway, **fields: Any) -> str:
    answer = gateway.post("/security/keys", fields)
    assert answer.status == 201, answer.body
    assert answer.headers["cache-control"] == "no-store"
    secret: str = answer.json()["key"]
    return secret


def test_a_key_is_made_used_rotated_and_revoked_over_two_processes(house: House) -> None:
    with ExitStack() as stack:
        one, two = (stack.enter_context(running_gateway(house.folder, env=house.env, key=ADMIN)) for _ in range(2))
        secret = make(one, id="alice", allow_agents=["up/m"], description="Alice's laptop")
        wait_for(lambda: house.lets_in(two, secret) == 200, what="the other process knows the key")
        assert (house.ask(one, secret), house.ask(two, secret)) == (200, 200)
        foreign = {"model": "up/n", "messages": [{"role": "user", "content": "Hello"}]}
        assert two.post("/v1/chat/completions", foreign, key=secret).status == 403
        assert two.post("/security/keys", {"id": "mallory"}, key=secret).status == 403

        listed = two.get("/security/keys")
        (alice,) = [key for key in listed.json()["data"] if key["id"] == "alice"]
        assert (alice["source"], alice["created_by"], alice["allow_agents"]) == ("store", "admin", ["up/m"])
        assert secret not in listed.body.decode()

        newer = one.post("/security/keys/alice/rotate", {"grace_s": 3600}).json()["key"]
        wait_for(lambda: house.lets_in(two, newer) == 200, what="the new secret is known")
        assert house.lets_in(two, secret) == 200
        newest = one.post("/security/keys/alice/rotate", {"grace_s": 0}).json()["key"]
        assert (house.lets_in(one, newest), house.lets_in(one, newer), house.lets_in(one, secret)) == (200, 401, 401)
        wait_for(lambda: house.lets_in(two, newer) == 401, what="the old secret is refused there, too")

        house.upstream.enqueue(fault("hang_part_way"))
        body = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        with two.stream("POST", "/v1/chat/completions", json_body=body, key=newest) as stream:
            events = stream.data()
            assert "error" not in next(events)
            revoked = time.monotonic()
            assert one.request("DELETE", "/security/keys/alice").json()["revoked_at"] is not None
            last = [json.loads(data) for data in events][-1]
            assert time.monotonic() - revoked < LONG_BEFORE_A_DEADLINE_S
            assert last["error"]["code"] == "invalid_api_key"
        assert (house.lets_in(one, newest), house.lets_in(two, newest)) == (401, 401)
        assert one.request("DELETE", "/security/keys/alice").status == 404
        assert one.post("/security/keys", {"id": "alice"}).status == 409
        operations = one.counted("agent_gateway_credential_operations")
        assert operations == {'operation="key_created"': 1, 'operation="key_rotated"': 2, 'operation="key_revoked"': 1}
        for gateway in (one, two):
            assert not any(shown in gateway.log_text() for shown in (secret, newer, newest))


def test_a_secret_that_a_rotation_ends_takes_its_streams_along(house: House) -> None:
    body = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    with running_gateway(house.folder, env=house.env, key=ADMIN) as gateway:
        secret = make(gateway, id="leaked", allow_agents=["up/m"])
        house.upstream.enqueue(fault("hang_part_way"), fault("hang_part_way"))
        with gateway.stream("POST", "/v1/chat/completions", json_body=body, key=secret) as thief:
            stolen = thief.data()
            assert "error" not in next(stolen)
            newer = gateway.post("/security/keys/leaked/rotate", {"grace_s": 3600}).json()["key"]
            with gateway.stream("POST", "/v1/chat/completions", json_body=body, key=newer) as owner:
                own = owner.data()
                assert "error" not in next(own)
                newest = gateway.post("/security/keys/leaked/rotate", {"grace_s": 3600}).json()["key"]
                last = [json.loads(data) for data in stolen][-1]
                assert last["error"]["code"] == "invalid_api_key", "two rotations later it is nobody's secret"
                gateway.post("/security/keys/leaked/rotate", {"grace_s": 0})
                last = [json.loads(data) for data in own][-1]
                assert last["error"]["code"] == "invalid_api_key", "and without a grace at once"
        assert house.lets_in(gateway, newest) == 401


def test_keys_of_the_file_are_read_only_and_nonsense_is_refused(house: House) -> None:
    with running_gateway(house.folder, env=house.env, key=ADMIN) as gateway:
        assert gateway.request("DELETE", "/security/keys/chat").status == 409
        assert gateway.post("/security/keys/chat/rotate").status == 409
        assert gateway.post("/security/keys", {"id": "chat"}).status == 409
        for fields in (
            {},
            {"id": "../x"},
            {"id": "x", "scopes": ["root"]},
            {"id": "x", "colour": "red"},
            {"id": "x", "allow_agents": ["ünicode/*"]},
            {"id": "x", "expires_at": "2020-01-01"},
            {"id": "x", "expires_at": "soon"},
            {"id": "x", "limits": {"requests_per_minute": 0}},
        ):
            assert gateway.post("/security/keys", fields).status == 400, fields
        assert gateway.post("/security/keys/x/rotate", {"grace_s": -1}).status == 400
        for method, path in (("GET", ""), ("POST", ""), ("POST", "/x/rotate"), ("DELETE", "/x")):
            assert gateway.request(method, f"/security/keys{path}", key=CHAT).status == 403
            assert gateway.request(method, f"/security/keys{path}", key="").status == 401
        assert [key["id"] for key in gateway.get("/security/keys").json()["data"] if key["source"] == "store"] == []


def test_a_key_until_the_last_day_there_is_can_be_listed(folder: tuple[Path, ScriptedUpstream]) -> None:
    home, _ = folder
    rules = (home / "security.yaml").read_text(encoding="utf-8")
    entry = f'  - {{id: ever, hashed_key: "{"e" * 64}", expires_at: 9999-12-31}}\n'
    (home / "security.yaml").write_text(rules.rstrip() + "\n" + entry, encoding="utf-8")
    with running_gateway(home, key=ADMIN) as gateway:
        for number, end in enumerate(("9999-12-31", "9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-12:00")):
            made = gateway.post("/security/keys", {"id": f"ever-{number}", "expires_at": end})
            assert (made.status, made.json().get("expires_at")) == (201, "9999-12-31T23:59:59+00:00"), made.body
        shown = {key["id"]: key["expires_at"] for key in gateway.get("/security/keys").json()["data"]}
        assert [shown[name] for name in ("ever", "ever-0")] == ["9999-12-31T23:59:59+00:00"] * 2
        assert gateway.post("/security/refresh").status == 200


def test_a_terminal_makes_and_ends_keys_of_a_running_gateway(folder: tuple[Path, ScriptedUpstream]) -> None:
    home, upstream = folder
    house = House(home, PATIENT | {"GATEWAY_STATE_DIR": str(home / "state")}, upstream)

    def gateway_keys(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gateway_cli", "keys", *arguments, "--path", str(house.folder / "agents")],
            env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"], **house.env, **pepper},
            cwd=house.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    pepper = {"GATEWAY_KEY_PEPPER": "a pepper of at least sixteen"}
    with running_gateway(house.folder, env=house.env | pepper, key=ADMIN) as gateway:
        made = json.loads(gateway_keys("create", "bob", "--allow", "up/*", "--expires", "2090-01-01", "--json"))
        wait_for(lambda: house.lets_in(gateway, made["key"]) == 200, what="the gateway knows the key")
        assert "bob  active  2090-01-01  chat    up/*" in gateway_keys("list")
        gateway_keys("create", "bob", status=1)
        gateway_keys("create", "eve", "--expires", "9999-12-31")
        assert "eve  active  9999-12-31" in gateway_keys("list")
        gateway_keys("revoke", "bob")
        wait_for(lambda: house.lets_in(gateway, made["key"]) == 401, what="the key is refused")
        assert "bob  revoked" in gateway_keys("list")
        other = json.loads(gateway_keys("create", "carol", "--json"))["key"]
    with running_gateway(house.folder, env=house.env, key=ADMIN) as gateway:
        # Whoever has the database but not the pepper has no key that works.
        assert house.lets_in(gateway, other) == 401
        gateway.logged("api_key.pepper.missing")
        assert len(gateway.log_events("api_key.pepper.missing")) == 1


def test_an_outage_of_the_store_is_never_a_401(folder: tuple[Path, ScriptedUpstream]) -> None:
    home, upstream = folder
    server = urlsplit(POSTGRES)
    with database("postgresql", home) as url, TcpProxy(server.hostname or "127.0.0.1", server.port or 5432) as proxy:
        house = House(
            home, {"GATEWAY_DATABASE_URL": url.replace(server.netloc, _through(server.netloc, proxy))}, upstream
        )
        with running_gateway(home, env=house.env, key=ADMIN) as gateway:
            secret = make(gateway, id="alice")
            proxy.cut()
            wait_for(
                lambda: gateway.get("/readyz").json()["components"]["store"] == "unavailable", what="the store is down"
            )
            assert house.ask(gateway, secret) == 200
            assert house.lets_in(gateway, "sk-unknown-to-everybody") == 401
            refused = gateway.post("/security/keys", {"id": "bob"})
            assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
            with running_gateway(home, env=house.env, key=ADMIN) as blind:
                # Started without the store: nobody can say whose key this is, so nobody says that it is wrong.
                assert house.lets_in(blind, secret) == 503
                assert house.lets_in(blind, ADMIN) == 200
                proxy.mend()
                wait_for(lambda: house.lets_in(blind, secret) == 200, what="the keys are read once the store is back")
                assert house.lets_in(blind, "sk-unknown-to-everybody") == 401
            wait_for(lambda: gateway.post("/security/keys", {"id": "bob"}).status == 201, what="keys are made again")


def test_the_database_holds_digests_alone(folder: tuple[Path, ScriptedUpstream]) -> None:
    home, _ = folder
    with database("postgresql", home) as url:
        env = {"GATEWAY_DATABASE_URL": url, "GATEWAY_KEY_PEPPER": "a pepper of at least sixteen"}
        with running_gateway(home, env=env, key=ADMIN) as gateway:
            secret = make(gateway, id="alice")
            assert gateway.get("/v1/models", key=secret).status == 200
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT * FROM gateway_api_keys").fetchone()
    assert row is not None
    assert secret not in str(row)
    assert "hmac-sha256:" in str(row)


def _through(netloc: str, proxy: TcpProxy) -> str:
    user, at, _ = netloc.rpartition("@")
    return f"{user}{at}127.0.0.1:{proxy.port}"
