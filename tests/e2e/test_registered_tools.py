"""Tools and MCP servers registered over HTTP: in every worker, over a restart, and within what the operator allows."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.http import Response
from tests.support.mcp_servers import http_server
from tests.support.server import Gateway, free_port, running_gateway
from tests.support.waiting import wait_for

ADMIN = "sk-test-admin-registered-aaaaaaaaaaaaaaaa"
CHAT = "sk-test-chat-registered-bbbbbbbbbbbbbbbbb"
NONE = "sk-test-none-registered-ccccccccccccccccc"
TOKEN = "sk-shop-canary-token-registered"
WORKERS = 2
SERVE = ("-m", "gateway_cli", "serve", "--workers", str(WORKERS), "--port")

SECURITY = f"""\
version: 1
api_keys:
  - {{id: admin, hashed_key: {hashlib.sha256(ADMIN.encode()).hexdigest()}, scopes: [chat, admin], allow_tools: ["*"]}}
  - {{id: chat, hashed_key: {hashlib.sha256(CHAT.encode()).hexdigest()}, allow_tools: ["*"]}}
  - {{id: none, hashed_key: {hashlib.sha256(NONE.encode()).hexdigest()}}}
"""
FILE = """\
version: 1
registration: {secrets: [SHOP_TOKEN], network: {allow_private: [127.0.0.1/32]}}
tools:
  - {name: listed, provider: http, url: "http://127.0.0.1:9/", description: Stands in the file.}
"""
DOCUMENT = {
    "openapi": "3.1.0",
    "info": {"title": "Bills", "version": "1"},
    "paths": {"/bills": {"get": {"operationId": "listBills", "responses": {"200": {"description": "Bills."}}}}},
}


class _Shop(http.server.BaseHTTPRequestHandler):
    """Answers what came: path and credential; one path is an OpenAPI document."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answer: Any = {"path": self.path, "token": self.headers.get("authorization")}
        body = json.dumps(DOCUMENT if self.path == "/openapi.json" else answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def shop() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Shop)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@contextmanager
def running(home: Path, **more: Any) -> Iterator[Gateway]:
    env = {"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"), "SHOP_TOKEN": TOKEN, "HIDDEN_TOKEN": TOKEN}
    with running_gateway(home, env=env, key=ADMIN, **more) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("registered")
    (home / "security.yaml").write_text(SECURITY)
    (home / "tools.yaml").write_text(FILE)
    with running(home, command=SERVE) as started:
        yield started


def register(gateway: Gateway, *, path: str = "/tools", key: str = ADMIN, **entry: Any) -> Response:
    return gateway.request("POST", path, json_body=entry, key=key)


def delete(gateway: Gateway, name: str, *, path: str = "/tools", key: str = ADMIN) -> Response:
    return gateway.request("DELETE", f"{path}/{name}", key=key)


def invoke(gateway: Gateway, name: str, *, key: str = CHAT) -> Response:
    return gateway.request("POST", f"/tools/{name}/invoke", json_body={}, key=key)


def everywhere(gateway: Gateway, name: str, **body: Any) -> set[int]:
    """Statuses of calls in every worker: one that did not register an entry learns of it a little later."""
    answers = gateway.ask_each_worker(WORKERS, "POST", f"/tools/{name}/invoke", json_body=body, key=CHAT)
    return {answer.status for answer in answers.values()}


def test_a_tool_is_registered_served_by_every_worker_and_deleted(gateway: Gateway, shop: str) -> None:
    entry = {"method": "GET", "url": f"{shop}/orders?secret=1", "headers": {"authorization": "Bearer env:SHOP_TOKEN"}}
    made = register(gateway, name="orders", provider="http", description="Search orders.", **entry)
    assert (made.status, made.headers["location"]) == (201, "/tools/orders"), made.body
    record = made.json()
    assert (record["source"], record["created_by"], record["tools"]) == ("store", "admin", ["orders"])
    assert (record["url"], record["headers"]) == (f"{shop}/orders", ["authorization"])
    wait_for(lambda: everywhere(gateway, "orders") == {200}, what="both workers serve it")
    assert invoke(gateway, "orders").json()["result"] == {"path": "/orders?secret=1", "token": f"Bearer {TOKEN}"}
    assert invoke(gateway, "orders", key=NONE).status == 403

    shown = gateway.request("GET", "/tools/orders", key=CHAT)
    assert (shown.json()["description"], shown.json()["url"]) == ("Search orders.", None)
    assert gateway.request("GET", "/tools/orders", key=NONE).error["code"] == "tool_not_found"
    entries = {item["entry"]: item["source"] for item in gateway.get("/tools").json()["entries"]}
    assert entries == {"listed": "configuration", "orders": "store"}
    assert TOKEN not in gateway.get("/tools").body.decode() and TOKEN not in gateway.log_text()

    again = register(gateway, name="orders", provider="http", **entry)
    assert (again.status, again.error["code"]) == (409, "conflict")
    assert delete(gateway, "orders", key=CHAT).status == 403
    assert delete(gateway, "orders").json() == {"name": "orders", "object": "tool_entry.deleted", "deleted": True}
    wait_for(lambda: everywhere(gateway, "orders") == {404}, what="no worker serves it")
    assert delete(gateway, "orders").status == 404
    assert register(gateway, name="orders", provider="http", **entry).status == 201, "the name is free again"
    delete(gateway, "orders")


def test_a_server_and_a_document_are_registered_and_found(gateway: Gateway, shop: str) -> None:
    port = free_port()
    with http_server(port):
        made = register(gateway, path="/tools/servers", name="library", url=f"http://127.0.0.1:{port}/mcp")
        assert (made.status, made.headers["location"]) == (201, "/tools/servers/library"), made.body
        bills = register(gateway, name="bills", provider="openapi", document=f"{shop}/openapi.json", server=shop)
        assert bills.json()["tools"] == ["bills__listBills"], bills.body
        wait_for(lambda: everywhere(gateway, "bills__listBills") == {200}, what="both workers read the document")

        wait_for(lambda: len(gateway.get("/tools/servers/library").json()["tools"]) == 3, what="its tools are listed")
        wait_for(
            lambda: everywhere(gateway, "library__find_book", arguments={"title": "Dune"}) == {200},
            what="both workers have a session",
        )
        (listed,) = gateway.get("/tools/servers").json()["data"]
        assert (listed["name"], listed["provider"], listed["source"]) == ("library", "mcp", "store")

        found = gateway.request("GET", "/tools/search?query=find+a+book&max_results=2", key=CHAT).json()["data"]
        assert found[0]["name"] == "library__find_book" and len(found) <= 2
        assert gateway.request("GET", "/tools/search?query=book", key=NONE).json()["data"] == []
        assert gateway.request("GET", "/tools/search?query=zebra", key=CHAT).json()["data"] == []
        for wrong in ("", "?query=", "?query=a&max_results=0", "?query=a&max_results=x", "?query=a&limit=3"):
            assert gateway.request("GET", f"/tools/search{wrong}", key=CHAT).status == 400, wrong

        one = delete(gateway, "library__find_book")
        assert one.status == 409 and "'library'" in one.error["message"]
        assert delete(gateway, "library", path="/tools/servers").status == 200
        assert delete(gateway, "bills").status == 200
        wait_for(lambda: everywhere(gateway, "library__whoami") == {404}, what="its tools are gone")
    assert gateway.get("/tools/servers/library").status == 404


def test_what_stands_in_the_file_is_left_alone(gateway: Gateway) -> None:
    taken = register(gateway, name="listed", provider="http", url="http://127.0.0.1:9/")
    assert taken.status == 409 and "tools.yaml" in taken.error["message"]
    kept = delete(gateway, "listed")
    assert kept.status == 409 and "tools.yaml" in kept.error["message"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"provider": "local", "module": "os:system"}, "tools.yaml alone"),
        ({"provider": "shell"}, "tools.yaml alone"),
        ({"provider": "file_ops", "workspace": "/etc"}, "tools.yaml alone"),
        ({"provider": "research", "search_url": "https://x.example/"}, "tools.yaml alone"),
        ({}, "provider: one of http"),
        ({"provider": "mcp", "command": ["sh", "-c", "touch /tmp/x"]}, "command: only tools.yaml"),
        ({"provider": "mcp", "url": "http://127.0.0.1:9/", "env": {"A": "b"}}, "env: only tools.yaml"),
        ({"provider": "mcp", "transport": "stdio"}, "programs to start"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "network": {"allow_private": ["0.0.0.0/0"]}}, "network"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "headers": {"x": "env:HIDDEN_TOKEN"}}, "headers.x"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "headers": {"x": "Bearer file:/etc/passwd"}}, "headers.x"),
        (
            {"provider": "mcp", "url": "http://127.0.0.1:9/", "key_headers": {"*": {"x": "env:HOME"}}},
            "key_headers",
        ),
        ({"provider": "openapi", "document": "/etc/passwd"}, "document"),
        ({"provider": "openapi", "document": "file:///etc/passwd"}, "document"),
        ({"provider": "openapi", "document": "http://127.0.0.1:9/openapi.json"}, "Nothing was registered"),
        ({"provider": "http", "url": "ftp://example.com/"}, "url"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "tiemout": 3}, "did you mean 'timeout'"),
        ({"provider": "mcp", "url": "http://h/", "overrides": {"a": {"tiemout": 3}}}, "did you mean 'timeout'"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "timeout": -1}, "timeout"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "schema": {"type": "string"}}, "schema"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "rules": [{"argument": "a"}]}, "rules"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "name": "servers"}, "name"),
        ({"provider": "http", "url": "http://127.0.0.1:9/", "name": "a/b"}, "name"),
    ],
)
def test_what_a_request_may_not_say_is_refused_with_the_reason(gateway: Gateway, entry: Any, words: str) -> None:
    answer = register(gateway, **{"name": "wrong", **entry})
    assert answer.status == 400 and words in answer.error["message"], answer.body
    assert TOKEN not in answer.body.decode()
    assert register(gateway, key=CHAT, **{"name": "wrong", **entry}).status == 403
    assert gateway.get("/tools/wrong").status == 404


def test_a_registered_tool_cannot_reach_inside_but_where_the_operator_says(gateway: Gateway) -> None:
    for number, host in enumerate(("169.254.169.254", "10.0.0.1", "[::1]", "127.0.0.2", "[64:ff9b::7f00:2]")):
        assert register(gateway, name=f"inside{number}", provider="http", url=f"http://{host}:9/").status == 201
        wait_for(lambda n=number: everywhere(gateway, f"inside{n}") == {403}, what="both workers refuse it")  # type: ignore[misc]
        assert delete(gateway, f"inside{number}").status == 200


def test_what_was_registered_is_there_after_a_restart_and_gone_when_the_operator_says_so(
    tmp_path: Path, shop: str
) -> None:
    (tmp_path / "security.yaml").write_text(SECURITY)
    (tmp_path / "tools.yaml").write_text(FILE)
    with running(tmp_path) as gateway:
        for name in ("orders", "bills"):
            assert register(gateway, name=name, provider="http", method="GET", url=f"{shop}/{name}").status == 201
        assert invoke(gateway, "orders").status == 200
    (tmp_path / "tools.yaml").write_text(
        FILE + '  - {name: bills, provider: http, method: GET, url: "http://127.0.0.1:9/"}\n'
    )
    with running(tmp_path) as gateway:
        wait_for(lambda: invoke(gateway, "orders").status == 200, what="it is served after a restart")
        assert invoke(gateway, "bills").error["code"] == "tool_denied", "the file's entry counts, and it stays outside"
        entries = [item for item in gateway.get("/tools").json()["entries"] if item["entry"] == "bills"]
        assert [item["source"] for item in entries] == ["configuration", "store"]
        assert "same name" in entries[1]["health"]["detail"]

        (tmp_path / "tools.yaml").write_text(FILE.replace("{secrets", "{enabled: false, secrets"))
        assert gateway.post("/tools/refresh", {}).status == 200
        assert invoke(gateway, "orders").status == 404
        refused = register(gateway, name="more", provider="http", url=shop)
        assert refused.status == 403 and "enabled: false" in refused.error["message"]
        assert delete(gateway, "orders").status == 200, "what is not served can be deleted"


def test_two_workers_do_not_register_one_name_twice(gateway: Gateway, shop: str) -> None:
    answers: list[int] = []

    def attempt() -> None:
        answers.append(register(gateway, name="race", provider="http", url=shop).status)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [201, *[409] * 5]
    assert delete(gateway, "race").status == 200
