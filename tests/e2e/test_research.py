"""`research` by the real server: a search service and pages on sockets, one of which is inside and hears nothing."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from openai import OpenAI

from tests.e2e.conftest import GatewayFactory
from tests.support.house import ADMIN, CHAT, furnish, write_agent
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, running_gateway

SECRET = "sk-canary-search-service-77777777"
Answer = tuple[int, dict[str, str], bytes]
HTML = {"content-type": "text/html; charset=utf-8"}

TOOLS = """\
version: 1
tools:
  - name: research
    provider: research
    search_url: http://127.0.0.1:{search}/search
    headers: {{authorization: Bearer env:SEARCH_TOKEN}}
    page_timeout: 20
    max_page_bytes: 20000
    network: {{allow_private: [127.0.0.1]}}
    page_network: {{allow_private: [localhost]}}
  - name: mapped
    provider: research
    search_url: http://127.0.0.1:{search}/v2?lang=de
    query_parameter: query
    parameters: {{count: "3"}}
    fields: {{results: web.results, title: name, url: link.href, snippet: about}}
    max_pages: 1
    max_result_bytes: 2000
    network: {{allow_private: [127.0.0.1]}}
    page_network: {{allow_private: [localhost]}}
  - {{name: guarded, provider: research, search_url: "http://127.0.0.1:{search}/search"}}
"""


@contextmanager
def site(answer: Callable[[str, dict[str, str]], Answer]) -> Iterator[tuple[int, list[str]]]:
    """A server on 127.0.0.1 that answers what it is told to, and tells what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, body = answer(self.path, {name.lower(): value for name, value in self.headers.items()})
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class World:
    """A search service, the web it knows, a server inside that nobody should ask, and the gateway before them."""

    def __init__(self, home: Path, upstream: ObedientUpstream, stack: ExitStack) -> None:
        self.results: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.inside, self.inside_asked = stack.enter_context(site(lambda path, headers: (200, HTML, b"SECRET INSIDE")))
        self.web, self.web_asked = stack.enter_context(site(self._page))
        self.search, self.search_asked = stack.enter_context(site(self._found))
        furnish(home, upstream.url)
        (home / "tools.yaml").write_text(TOOLS.format(search=self.search), encoding="utf-8")
        security = (home / "security.yaml").read_text(encoding="utf-8")
        for key in ("admin", "chat"):
            security = security.replace(f"  - id: {key}\n", f'  - id: {key}\n    allow_tools: ["*"]\n')
        (home / "security.yaml").write_text(security, encoding="utf-8")
        extra = "from sdk_adapter.gateway_tools import gateway_tool\n"
        write_agent(home / "agents", "Reader", "You read.", extra=extra, tools='gateway_tool("research")')
        env = {"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"), "SEARCH_TOKEN": SECRET}
        self.gateway: Gateway = stack.enter_context(running_gateway(home, env=env, key=ADMIN, cwd=home))

    def at(self, path: str) -> str:
        return f"http://localhost:{self.web}{path}"

    def find(self, *results: dict[str, Any] | str) -> None:
        """Have the service find these; a path is a page of the web."""
        self.results = [
            {"title": f"About {item}", "url": self.at(item), "content": "A snippet."} if isinstance(item, str) else item
            for item in results
        ]

    def ask(self, tool: str = "research", **arguments: Any) -> Response:
        body = {"arguments": {"query": "what & why", **arguments}}
        return self.gateway.request("POST", f"/tools/{tool}/invoke", json_body=body, key=CHAT, timeout_s=120)

    def _found(self, path: str, headers: dict[str, str]) -> Answer:
        self.headers = headers
        if path.startswith("/v2"):
            items = [{"name": it["title"], "link": {"href": it["url"]}, "about": "x" * 400} for it in self.results]
            return 200, {"content-type": "application/json"}, json.dumps({"web": {"results": items}}).encode()
        if self.results == [{"broken": True}]:
            return 200, {"content-type": "application/json"}, b'{"answer": 42}'
        if self.results == [{"down": True}]:
            return 403, {"content-type": "text/plain"}, b"no such key"
        return 200, {"content-type": "application/json"}, json.dumps({"results": self.results}).encode()

    def _page(self, path: str, headers: dict[str, str]) -> Answer:
        if path.startswith("/good"):
            body = "<title>Good</title><script>hidden</script><h1>Häding</h1><p>Words of " + path
            return 200, HTML, body.encode()
        if path == "/latin":
            return 200, {"content-type": "text/html; charset=iso-8859-1"}, "<p>ä".encode("latin-1")
        if path == "/plain":
            return 200, {"content-type": "text/plain"}, b"a < b"
        if path == "/moved":
            return 302, {"location": "/good/moved"}, b""
        if path == "/inwards":
            return 302, {"location": f"http://127.0.0.1:{self.inside}/secret"}, b""
        if path == "/circle":
            return 302, {"location": "/circle"}, b""
        if path == "/file":
            return 302, {"location": "file:///etc/passwd"}, b""
        if path == "/odd":
            return 302, {"location": "http://[/"}, b""
        if path.startswith("/charset-"):
            return 200, {"content-type": f"text/html; charset={path.removeprefix('/charset-')}"}, "<p>ß".encode()
        if path == "/pdf":
            return 200, {"content-type": "application/pdf"}, b"%PDF"
        if path == "/packed":
            return 200, {**HTML, "content-encoding": "gzip"}, b"\x1f\x8b"
        if path == "/long":
            return 200, HTML, b"<p>" + b"word " * 100_000
        return 404, HTML, b"<p>nothing"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("research"), upstream, stack)


def test_it_searches_and_reads_the_first_pages(world: World) -> None:
    world.find("/good/1", "/plain", "/latin", "/good/4")
    result = world.ask().json()["result"]
    assert parse_qs(urlsplit(world.search_asked[-1]).query) == {"q": ["what & why"], "format": ["json"]}
    assert world.headers["authorization"] == f"Bearer {SECRET}"
    assert (result["query"], result["truncated"]) == ("what & why", False)
    assert [item.get("text") for item in result["results"]] == ["Häding\nWords of /good/1", "a < b", "ä", None]
    assert result["results"][0] == {
        "title": "About /good/1",
        "url": world.at("/good/1"),
        "snippet": "A snippet.",
        "text": "Häding\nWords of /good/1",
        "truncated": False,
    }
    assert "text" not in json.dumps(world.ask(pages=0).json()["result"]["results"])
    refused = world.ask(pages=6)
    assert refused.status == 400 and "pages" in refused.error["message"]


def test_the_web_is_never_given_what_is_the_search_services(world: World) -> None:
    seen: list[dict[str, str]] = []
    with site(lambda path, headers: (seen.append(headers), (200, HTML, b"ok"))[1]) as (port, _):
        world.find({"title": "", "url": f"http://localhost:{port}/", "content": ""})
        assert world.ask().json()["result"]["results"][0]["text"] == "ok"
    assert len(seen) == 1 and "authorization" not in seen[0] and "cookie" not in seen[0]
    assert SECRET not in json.dumps(seen) and SECRET not in world.gateway.log_text()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/inwards", "inside a private network"),
        ("/circle", "redirects more than 5 times"),
        ("/file", "no address of a page"),
        ("/odd", "redirects to what is no address"),
        ("/pdf", "no text: application/pdf"),
        ("/packed", "compressed"),
        ("/none", "HTTP 404"),
    ],
)
def test_a_page_that_cannot_be_read_is_named_and_spares_the_others(world: World, path: str, words: str) -> None:
    world.find("/good/1", path, "/moved")
    first, second, third = world.ask().json()["result"]["results"]
    assert (first["text"], third["text"]) == ("Häding\nWords of /good/1", "Häding\nWords of /good/moved")
    assert words in second["error"] and "text" not in second
    assert world.inside_asked == []


def test_an_encoding_that_no_page_has_is_taken_for_utf_8(world: World) -> None:
    world.find("/charset-punycode", "/charset-hex", "/charset-nonsense", "/charset-utf-16")
    texts = [item["text"] for item in world.ask(pages=4).json()["result"]["results"]]
    assert texts[:3] == ["ß"] * 3 and texts[3] not in ("", "ß")


def test_pages_inside_are_not_asked_and_what_is_no_page_is_left_out(world: World) -> None:
    inside = {"title": "inside", "url": f"http://127.0.0.1:{world.inside}/", "content": ""}
    metadata = {"title": "metadata", "url": "http://169.254.169.254/latest/", "content": ""}
    wrong = [{"url": "file:///etc/passwd"}, {"url": "https://u:p@example.com/"}, {"url": 7}, {}, "text", None]
    world.find(inside, metadata, "/good/1", "/good/1", "/good/1#part")
    world.results += wrong
    results = world.ask().json()["result"]["results"]
    assert [item["title"] for item in results] == ["inside", "metadata", "About /good/1"]
    assert ["inside a private network" in item.get("error", "") for item in results] == [True, True, False]
    assert world.inside_asked == []


def test_a_server_that_is_gone_is_named(world: World) -> None:
    with site(lambda path, headers: (200, HTML, b"")) as (port, _):
        pass
    world.find({"title": "gone", "url": f"http://localhost:{port}/", "content": ""}, "/good/1")
    gone, good = world.ask().json()["result"]["results"]
    assert "cannot be reached" in gone["error"] and good["text"]


def test_everything_is_bounded(world: World) -> None:
    world.find("/long")
    (item,) = world.ask().json()["result"]["results"]
    assert item["truncated"] and 15_000 < len(item["text"]) <= 20_000
    world.find(*(f"/good/{number}" for number in range(30)))
    assert len(world.ask(pages=0).json()["result"]["results"]) == 20
    world.find("/long", *(f"/good/{number}" for number in range(9)))
    answer = world.ask("mapped")
    assert len(json.dumps(answer.json()["result"], separators=(",", ":")).encode()) <= 2_000
    assert answer.json()["result"]["truncated"]


def test_another_shape_of_answer_is_read_by_its_fields(world: World) -> None:
    world.find("/good/1")
    (item,) = world.ask("mapped").json()["result"]["results"]
    assert (item["title"], item["url"], item["text"]) == (
        "About /good/1",
        world.at("/good/1"),
        "Häding\nWords of /good/1",
    )
    assert parse_qs(urlsplit(world.search_asked[-1]).query) == {"lang": ["de"], "count": ["3"], "query": ["what & why"]}


def test_a_service_that_fails_says_so(world: World) -> None:
    world.results = [{"broken": True}]
    answer = world.ask()
    assert answer.status == 502 and "no list at 'results'" in answer.error["message"]
    world.results = [{"down": True}]
    answer = world.ask()
    assert answer.status == 200 and "HTTP 403: no such key" in answer.json()["error"]
    refused = world.ask("guarded")
    assert refused.status == 403 and "network.allow_private" in refused.error["message"]


def test_an_agent_researches(world: World) -> None:
    world.find("/good/agent")
    with OpenAI(api_key=CHAT, base_url=f"{world.gateway.url}/v1", max_retries=0) as client:
        said = client.chat.completions.create(
            model="default/reader",
            messages=[{"role": "user", "content": 'call research {"query":"x","pages":1} ;; echo'}],
        )
    assert "Words of /good/agent" in (said.choices[0].message.content or "")


def test_a_wrong_entry_is_refused_when_the_gateway_reads_it(start: GatewayFactory, tmp_path: Path) -> None:
    """While it runs, so that what was served goes on."""
    home = tmp_path / "home"
    gateway = start(
        prepare=lambda home: (home / "tools.yaml").write_text("version: 1\n"),
        env={"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml")},
        home=home,
    )
    for entry, words in {
        'provider: research, search_url: "https://x.example/{q}"': "goes into query_parameter",
        "provider: research": "search_url",
        'provider: research, search_url: "ftp://x"': "https://",
        'provider: research, search_url: "https://x.example", fields: {reslts: x}': "did you mean 'results'",
        "provider: shell, workspace: .": "folders of the gateway itself",
        "provider: shell, limits: {memory: 1}": "did you mean 'memory_bytes'",
        "provider: shell, schema: {}": "unknown key 'schema'",
    }.items():
        (home / "tools.yaml").write_text(f"version: 1\ntools:\n  - {{name: a, {entry}}}\n")
        answer = gateway.request("POST", "/tools/refresh", key=ADMIN)
        assert answer.status == 400 and words in answer.error["message"], (entry, answer.body)
