"""An OTLP/HTTP collector on a real socket that keeps what it is sent, or misbehaves."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan

from tests.support.waiting import wait_for


@dataclass(frozen=True)
class Span:
    """One span as it came. Ids are hex; ``parent`` is empty at the top."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    failed: bool
    seconds: float


@dataclass
class Collector:
    """What was received. While ``hanging`` is set nothing is answered; ``refuse`` answers 503."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    requests: int = 0
    refuse: bool = False

    def of_request(self, request_id: str) -> list[Span]:
        """Every span of the trace that a request is in; empty until its server span is there."""
        spans = list(self.spans)
        for span in spans:
            if span.kind == "SERVER" and span.attributes["gateway.request_id"] == request_id:
                return [other for other in spans if other.trace == span.trace]
        return []

    def wait_for_request(self, request_id: str) -> list[Span]:
        """Return the spans of a request as soon as its server span is there, which ends last."""
        return wait_for(lambda: self.of_request(request_id), what=f"the spans of {request_id!r}")

    def take(self, headers: dict[str, str], body: bytes) -> None:
        """Keep one export."""
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        self.headers.append(headers)
        self.bodies.append(body)
        for group in request.resource_spans:
            self.resources.append(_attributes(group.resource.attributes))
            self.spans += [_read(span) for scope in group.scope_spans for span in scope.spans]


def _read(span: WireSpan) -> Span:
    return Span(
        name=span.name,
        kind=WireSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        failed=span.status.code == 2,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def otlp_receiver() -> Iterator[Collector]:
    """Run a collector; ``url`` is for ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.requests += 1
            body = self.rfile.read(int(self.headers["content-length"]))
            if collector.hanging.is_set():
                collector.released.wait(60)
            if collector.refuse or self.path != "/v1/traces":
                self._answer(503)
                return
            collector.take({name.lower(): value for name, value in self.headers.items()}, body)
            self._answer(200)

        def _answer(self, status: int) -> None:
            try:
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()
            except OSError:
                pass  # the gateway has gone

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
