"""`gateway audit` finds what it says it looks for, and its exit code tells."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Settings
from gateway.security.config import ApiKey, SecurityConfig
from gateway.security.stored import StoredKey
from gateway_cli.advisories import audit_packages, installed_packages
from gateway_cli.audit import audit_keys, audit_stored_keys
from gateway_cli.main import main
from gateway_cli.unreferenced import find_unreferenced

NOW = datetime(2030, 6, 1, tzinfo=UTC)
GOOD = "2031-01-01"
DIGEST = hashlib.sha256(b"k" * 32).hexdigest()
DEV = hashlib.sha256(b"dev-secret").hexdigest()


@pytest.mark.parametrize(
    ("key", "kinds"),
    [
        (ApiKey("good", hashed_key=DIGEST, expires_at=GOOD), []),
        (ApiKey("clear", key="sk-in-clear", expires_at=GOOD), ["plaintext_key"]),
        (ApiKey("endless", hashed_key=DIGEST), ["key_without_expiry"]),
        (ApiKey("over", hashed_key=DIGEST, expires_at="2030-05-30"), ["expired_key"]),
        (ApiKey("soon", hashed_key=DIGEST, expires_at="2030-06-06"), ["key_expiring"]),
        (ApiKey("in a week", hashed_key=DIGEST, expires_at="2030-06-08"), []),
        (ApiKey("dev", hashed_key=DEV), ["default_key"]),
        (ApiKey("dev", key="dev-secret"), ["default_key"]),
        (ApiKey("both", key="sk-in-clear"), ["plaintext_key", "key_without_expiry"]),
    ],
    ids=lambda value: value.id if isinstance(value, ApiKey) else None,
)
def test_keys_of_the_file(key: ApiKey, kinds: list[str]) -> None:
    found = list(audit_keys(SecurityConfig(api_keys=[key]), NOW.timestamp(), is_development=False))
    assert [finding.kind for finding in found] == kinds
    assert all(finding.subject == key.id and "sk-in-clear" not in finding.message for finding in found)


def test_the_development_key_is_as_it_should_be_in_development() -> None:
    config = SecurityConfig(api_keys=[ApiKey("dev", hashed_key=DEV)])
    assert not list(audit_keys(config, NOW.timestamp(), is_development=True))


def test_stored_keys() -> None:
    def stored(name: str, days: float | None, *, revoked: bool = False) -> StoredKey:
        until = None if days is None else (NOW + timedelta(days=days)).timestamp()
        ended = NOW.timestamp() if revoked else None
        return StoredKey(id=name, digest="sha256:0", created_at=0, created_by="x", expires_at=until, revoked_at=ended)

    keys = [stored("endless", None), stored("over", -1), stored("soon", 3), stored("good", 30)]
    found = audit_stored_keys([*keys, stored("gone", None, revoked=True)], NOW.timestamp())
    assert [(finding.subject, finding.kind) for finding in found] == [
        ("endless", "key_without_expiry"),
        ("over", "expired_key"),
        ("soon", "key_expiring"),
    ]


def test_files_that_no_agent_reaches(tmp_path: Path) -> None:
    files = {
        "Weather/agent.py": "import prices\nfrom .lib import names\nfrom . import near\nimport json\n",
        "Weather/prices.py": "import importlib\nimportlib.import_module('late')\n",
        "Weather/late.py": "SERVER = 'server.py'",
        "Weather/server.py": "",
        "Weather/near.py": "",
        "Weather/lib/__init__.py": "",
        "Weather/lib/names.py": "from ..far import x",
        "Weather/far.py": "x = 1",
        "Weather/forgotten.py": "",
        "Weather/test_weather.py": "",
        "Weather/json/old.py": "",
        "Broken/agent.py": "def (",
        "Broken/unknown.py": "",
        "single.py": "",
        "drafts/idea.py": "",
        "labs/Research/agent.py": "",
        "labs/Research/prices.py": "# another agent's prices do not reach this one",
        ".hidden/x.py": "",
    }
    for name, text in files.items():
        (tmp_path / "agents" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "agents" / name).write_text(text, encoding="utf-8")
    found = find_unreferenced(Settings(agent_path=tmp_path / "agents"))
    assert {Path(path).relative_to((tmp_path / "agents").resolve()).as_posix() for path in found} == {
        "Weather/forgotten.py",
        "Weather/json/old.py",
        "drafts/idea.py",
        "labs/Research/prices.py",
    }


@contextmanager
def advisories(answer: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    """A service that speaks OSV's API; ``answer`` makes its answer of a query."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/querybatch"
            text = json.dumps({"results": [answer(query) for query in body["queries"]]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_packages_are_asked_about_all_of_them() -> None:
    asked = []

    def answer(query: dict[str, Any]) -> dict[str, Any]:
        asked.append(query["package"]["name"])
        assert query["package"]["ecosystem"] == "PyPI"
        is_bad = query["package"]["name"] == "msgspec"
        return {"vulns": [{"id": "GHSA-1"}, {"id": "CVE-2"}]} if is_bad else {}

    with advisories(answer) as url:
        found = audit_packages(url)
    assert asked == list(installed_packages())
    assert found.installed == found.audited == len(asked) > 50
    assert found.vulnerable == (("msgspec", installed_packages()["msgspec"], ("GHSA-1", "CVE-2")),)
    assert "agent-gateway" not in asked


def test_a_package_without_an_answer_is_not_audited() -> None:
    with advisories(lambda query: None if query["package"]["name"] == "msgspec" else {}) as url:
        found = audit_packages(url)
    assert found.audited == found.installed - 1


def test_what_is_installed_is_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("".join(f"{n}=={v}\n" for n, v in installed_packages().items() if n != "pyyaml"), encoding="utf-8")
    lock.write_text(lock.read_text().replace("msgspec==", "msgspec==999"), encoding="utf-8")
    with advisories(lambda query: {}) as url:
        found = audit_packages(url, lock)
    assert [name for name, _ in found.drifted] == ["msgspec", "pyyaml"]
    assert "no such package" in found.drifted[1][1]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    agent = tmp_path / "agents" / "Weather" / "agent.py"
    agent.parent.mkdir(parents=True)
    agent.touch()
    (tmp_path / "config").mkdir()
    write_key(tmp_path, "2999-01-01")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(tmp_path / "state"))
    return tmp_path


def write_key(home: Path, day: str) -> None:
    entry = {"id": "alice", "hashed_key": DIGEST, "expires_at": day}
    (home / "config" / "security.yaml").write_text(json.dumps({"version": 1, "api_keys": [entry]}), encoding="utf-8")


def test_the_exit_code_tells(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with advisories(lambda query: {}) as url:
        assert main(["audit", "--advisories", url]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["findings"] == []
        assert report["environment"] == "production"
        assert report["packages"]["installed"] == report["packages"]["audited"]

        write_key(house, "2001-01-01")
        assert main(["audit", "--advisories", url]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["totals"] == {"expired_key": 1, "all": 1}


def test_a_service_that_does_not_answer_is_a_failure_that_says_how_many(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--advisories", "http://127.0.0.1:9"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["audited"] == 0
    (finding,) = report["findings"]
    assert finding["kind"] == "packages_not_audited"
    assert finding["subject"] == f"{report['packages']['installed']} of {report['packages']['installed']}"

    assert main(["audit", "--no-packages"]) == 0


def test_keys_of_the_database_are_audited(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "bob"]) == 0
    capsys.readouterr()
    assert main(["audit", "--no-packages"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["kind"], finding["subject"]) == ("key_without_expiry", "bob")


def test_the_packages_own_defaults_are_not_the_operators_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a `security.yaml` of one's own there is nothing to delete; as one's own, the same file is a finding."""
    package = tmp_path / "gateway"
    (package / "defaults").mkdir(parents=True)
    file = package / "defaults" / "security.yaml"
    file.write_text(f"version: 1\napi_keys: [{{id: dev, hashed_key: '{DEV}'}}]\n", encoding="utf-8")
    monkeypatch.setenv("GATEWAY_SECURITY_CONFIG", str(file))
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "--no-packages"]) == 1
    assert json.loads(capsys.readouterr().out)["totals"]["default_key"] == 1
    monkeypatch.setattr("gateway.__file__", str(package / "__init__.py"))
    assert main(["audit", "--no-packages"]) == 0
