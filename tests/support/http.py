"""A plain HTTP client for tests: exact bytes out, exact bytes in, events of a stream as they arrive."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.waiting import wait_for


@dataclass(frozen=True)
class Response:
    """A whole answer; header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Decode the body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a refusal."""
        error: dict[str, Any] = self.json()["error"]
        return error


@dataclass(frozen=True)
class Stream:
    """An open answer. ``lines`` yields each line of the body without its end, as soon as it is there."""

    status: int
    headers: Mapping[str, str]
    raw: http.client.HTTPResponse
    connection: http.client.HTTPConnection

    def lines(self) -> Iterator[str]:
        """Yield lines until the server ends the body."""
        while line := self.raw.readline():
            yield line.decode().rstrip("\r\n")

    def data(self) -> Iterator[str]:
        """Yield the payload of each ``data:`` line."""
        for line in self.lines():
            if line.startswith("data:"):
                yield line.removeprefix("data:").strip()

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Yield decoded events; ends at ``[DONE]``."""
        for data in self.data():
            if data == "[DONE]":
                return
            yield json.loads(data)


class HttpClient:
    """Talks to one server on loopback; every call is a connection of its own."""

    def __init__(self, port: int, *, key: str | None = None) -> None:
        self.port = port
        self.key = key

    def request(
        self,
        method: str,
        path: str,
        *,
        json_body: Any = None,
        body: bytes | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        connection: http.client.HTTPConnection | None = None,
    ) -> Response:
        """Send one request and read the whole answer. ``key=""`` sends none.

        ``connection`` is one to send it on; it is closed unless ``headers`` ask to keep it alive.
        """
        with self.stream(
            method,
            path,
            json_body=json_body,
            body=body,
            key=key,
            headers=headers,
            timeout_s=timeout_s,
            connection=connection,
        ) as stream:
            return Response(stream.status, stream.headers, stream.raw.read())

    def get(self, path: str, **options: Any) -> Response:
        """GET ``path``."""
        return self.request("GET", path, **options)

    def post(self, path: str, json_body: Any = None, **options: Any) -> Response:
        """POST ``json_body``."""
        return self.request("POST", path, json_body=json_body, **options)

    def ask_each_worker(
        self, workers: int, method: str, path: str, *, json_body: Any = None, key: str | None = None
    ) -> dict[int, Response]:
        """Send a request to each of so many workers; return the answers by slot. The client's own key is an admin's.

        A kept connection stays with the worker that accepted it, which says first who it is.
        """
        answers: dict[int, Response] = {}

        def ask() -> bool:
            with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
                kept = {"headers": {"connection": "keep-alive"}, "connection": connection}
                slot = self.get("/health", **kept).json()["components"]["process"]["worker"]
                if slot not in answers:
                    answers[slot] = self.request(method, path, json_body=json_body, key=key, **kept)
            return len(answers) == workers

        wait_for(ask, every_s=0.001, what=f"each of {workers} workers takes a connection")
        return answers

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        json_body: Any = None,
        body: bytes | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        connection: http.client.HTTPConnection | None = None,
    ) -> Iterator[Stream]:
        """Send one request and hand out the answer while it arrives; leaving the block closes a socket of its own."""
        sent = {"connection": "close"}
        shown = self.key if key is None else key
        if shown:
            sent["authorization"] = f"Bearer {shown}"
        if json_body is not None:
            body = json.dumps(json_body).encode()
        if body is not None:
            sent["content-type"] = "application/json"
        with ExitStack() as stack:
            if connection is None:
                own = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
                connection = stack.enter_context(closing(own))
            connection.request(method, path, body=body, headers=sent | dict(headers or {}))
            with closing(connection.getresponse()) as raw:
                yield Stream(raw.status, {k.lower(): v for k, v in raw.getheaders()}, raw, connection)
