"""The OpenTelemetry side of traces: makes spans and sends them to a collector by OTLP over HTTP, in a thread.

The standard variables say where and how (`OTEL_EXPORTER_OTLP_ENDPOINT`, `…_HEADERS`, `…_TIMEOUT`, `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_…`). Spans wait in a queue of bounded length; what does not fit, or what the
collector does not take, is counted and lost, and no request ever waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind as OtelKind
from opentelemetry.trace import Tracer as OtelTracer

from gateway import __version__
from gateway.observability.logs import log_event
from gateway.observability.traces import Attributes, OpenSpan, RemoteParent, SpanKind

Count = Callable[[str, int], None]
"""Told on the event loop what became of spans: ``sent``, ``failed`` or ``dropped``, and of how many."""

_log = logging.getLogger("gateway.traces")

_KINDS: dict[SpanKind, OtelKind] = {
    "internal": OtelKind.INTERNAL,
    "server": OtelKind.SERVER,
    "client": OtelKind.CLIENT,
}
_QUEUE = 2_048
_SAY_AGAIN_S = 60.0
_NOISY = ("opentelemetry", "urllib3.connectionpool")
"""Loggers that would write a line for every batch that is lost, some with addresses; ours is one line a minute."""


class SpanMaker:
    """Makes spans with OpenTelemetry (`gateway.observability.traces.Tracer`)."""

    def __init__(self, tracer: OtelTracer, *, with_content: bool) -> None:
        self._tracer = tracer
        self.with_content = with_content

    def begin(
        self, name: str, kind: SpanKind, attributes: Attributes, parent: OpenSpan | RemoteParent | None
    ) -> _OpenSpan:
        """See `gateway.observability.traces.Tracer.begin`."""
        above: OtelSpan | None = None
        if isinstance(parent, _OpenSpan):
            above = parent.otel
        elif isinstance(parent, RemoteParent):
            above = NonRecordingSpan(SpanContext(parent.trace_id, parent.span_id, is_remote=True))
        context = set_span_in_context(above) if above is not None else None
        span = self._tracer.start_span(name, context=context, kind=_KINDS[kind], attributes=_given(attributes))
        return _OpenSpan(span)


class _OpenSpan:
    __slots__ = ("otel",)

    def __init__(self, otel: OtelSpan) -> None:
        self.otel = otel

    @property
    def traceparent(self) -> str:
        context = self.otel.get_span_context()
        ids = f"{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}"
        return f"00-{ids}-{context.trace_flags & 1:02x}"

    @property
    def is_recording(self) -> bool:
        return self.otel.is_recording()

    def set(self, attributes: Attributes) -> None:
        self.otel.set_attributes(_given(attributes))

    def rename(self, name: str) -> None:
        self.otel.update_name(name)

    def end(self, error_type: str | None) -> None:
        if not self.otel.is_recording():
            return
        if error_type is not None:
            self.otel.set_attribute("error.type", error_type)
            if error_type != "cancelled":
                self.otel.set_status(Status(StatusCode.ERROR))
        self.otel.end()


@asynccontextmanager
async def open_tracer(
    service: str, share: float, *, with_content: bool, flush_s: float, count: Count
) -> AsyncIterator[SpanMaker]:
    """Open a tracer that keeps ``share`` (0 to 1) of the traces; at the end, spans have ``flush_s`` seconds to leave.

    Which traces are kept is decided by their ids alone, whatever a caller says of its own.
    """
    loop = asyncio.get_running_loop()

    def counted(outcome: str, number: int) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(count, outcome, number)

    with _quiet():
        exporter = _Exporter(OTLPSpanExporter(), counted)
        queue = _Queue(BatchSpanProcessor(exporter), exporter)
        sampler = TraceIdRatioBased(share)
        own = {"service.name": service, "service.version": __version__, "service.instance.id": str(os.getpid())}
        provider = TracerProvider(
            sampler=ParentBased(sampler, remote_parent_sampled=sampler, remote_parent_not_sampled=sampler),
            resource=Resource(own).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(queue)
        try:
            yield SpanMaker(provider.get_tracer("gateway", __version__), with_content=with_content)
        finally:
            ended = asyncio.Event()
            # A thread of its own, that the process does not wait for: a collector that hangs holds nothing up.
            threading.Thread(target=_shut_down, args=(provider, loop, ended), daemon=True).start()
            with suppress(TimeoutError):
                async with asyncio.timeout(flush_s):
                    await ended.wait()
            exporter.give_up()


def _shut_down(provider: TracerProvider, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    provider.shutdown()
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(ended.set)


class _Queue(SpanProcessor):
    """Lets no more spans wait than there is room for; the SDK's own would log each that it drops."""

    def __init__(self, batches: BatchSpanProcessor, exporter: _Exporter) -> None:
        self._batches, self._exporter = batches, exporter

    def on_end(self, span: ReadableSpan) -> None:
        """Queue an ended span."""
        if span.context is not None and span.context.trace_flags.sampled and self._exporter.has_room():
            self._batches.on_end(span)

    def shutdown(self) -> None:
        """Send what waits, and end."""
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits."""
        return self._batches.force_flush(timeout_millis)


class _Exporter(SpanExporter):
    """Counts what becomes of spans around the real exporter; says once a minute that it fails, and when it is well."""

    def __init__(self, inner: SpanExporter, count: Count) -> None:
        self._inner, self._count = inner, count
        self._lock = threading.Lock()
        self._waiting = 0
        self._said_at: float | None = None

    def has_room(self) -> bool:
        """Return whether one more span may wait, and count it as waiting; else as lost."""
        with self._lock:
            room = self._waiting < _QUEUE
            self._waiting += room
        if not room:
            self._count("dropped", 1)
        return room

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; runs in the thread of the queue."""
        try:
            result = self._inner.export(spans)
        finally:
            with self._lock:
                self._waiting -= len(spans)
        if result is SpanExportResult.SUCCESS:
            self._count("sent", len(spans))
            if self._said_at is not None:
                self._said_at = None
                log_event(_log, "traces.export.recovered")
        else:
            self._count("failed", len(spans))
            now = time.monotonic()
            if self._said_at is None or now - self._said_at >= _SAY_AGAIN_S:
                self._said_at = now
                log_event(
                    _log,
                    "traces.export.failed",
                    level=logging.WARNING,
                    message="The collector takes no spans; they are lost. See OTEL_EXPORTER_OTLP_ENDPOINT.",
                    spans=len(spans),
                )
        return result

    def give_up(self) -> None:
        """End an export that still tries."""
        self._inner.shutdown()

    def shutdown(self) -> None:
        """End; the queue calls it."""


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _given(attributes: Attributes) -> dict[str, str | bool | int | float | tuple[str, ...]]:
    return {name: value for name, value in attributes.items() if value is not None}
