"""The ASGI application: one dispatcher in front of everything.

Every request passes the same door here (request id, route, key, scope), whether a plain ASGI handler serves it or
FastAPI does. FastAPI is imported at the first request that needs it: `/health` and the chat surface never wait for
it. Importing this module opens nothing and reads no environment; the lifespan does.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from contextlib import AsyncExitStack
from typing import Any

from api.bootstrap import Gateway, open_gateway
from api.client import Client
from api.dependencies import caller, correlation_id, read_body, read_headers, request_id
from api.draining import draining
from api.edge import CLOSED
from api.errors import error_response, public
from api.mcp.metadata import challenge
from api.route_table import TABLE
from api.routing import Receive, Request, Route, RouteTable, Scope, Send
from gateway.chat import decode_body
from gateway.config import Settings
from gateway.errors import ConfigError, GatewayError, ScopeRequired, ServiceUnavailable
from gateway.ids import RandomIds
from gateway.observability.logs import EventShape, LogContext, bind_request_id, log_event
from gateway.observability.metrics import METHODS
from gateway.observability.traces import Span, Tracer, remote_parent
from gateway.workers.workers import Workers

_log = logging.getLogger("api")
_ANSWERED = EventShape(
    _log,
    "http.request",
    *("method", "path", "status", "duration_ms", "key_id", "client_ip", "user_agent"),
    foreign=("method", "client_ip", "user_agent"),
)

_NOT_STARTED = ServiceUnavailable(
    "The gateway is not running: its server must start it (ASGI lifespan), and has not, or has stopped it again."
)

_LAST = frozenset({401, 408, 413})
"""Refusals after which a connection is closed: of what is still to come of the request nothing is wanted."""


class GatewayApp:
    """The product as one ASGI 3 application; ``settings`` default to the environment, read at start-up.

    ``workers`` and ``own_port`` are for one process of several; see `open_gateway`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        table: RouteTable = TABLE,
        *,
        workers: Workers | None = None,
        own_port: int | None = None,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._own_port = own_port
        self._table = table
        self._gateway: Gateway | None = None
        self._cold: asyncio.Future[Any] | None = None
        self._ids = RandomIds()

    @property
    def gateway(self) -> Gateway | None:
        """What the lifespan opened; None before it starts and after it ends."""
        return self._gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000, "reason": "WebSockets are not served."})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with AsyncExitStack() as stack:
            try:
                settings = self._settings or Settings.from_env()
                self._gateway = await stack.enter_async_context(
                    open_gateway(settings, workers=self._workers, own_port=self._own_port)
                )
            except ConfigError as error:
                await send({"type": "lifespan.startup.failed", "message": error.message})
                return
            except Exception as error:  # noqa: BLE001 - a server takes an exception for "no lifespan", and serves on
                log_event(_log, "gateway.start.failed", level=logging.ERROR, exc_info=error)
                message = f"The gateway could not start: {type(error).__name__}: {error}. The line above has the cause."
                await send({"type": "lifespan.startup.failed", "message": message})
                return
            engine, drain_s = self._gateway.engine, settings.drain_s
            stack.enter_context(draining(lambda: engine.drain(drain_s)))
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self._gateway.loaded.set()
        self._gateway = None
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = read_headers(scope)
        rid = request_id(headers, self._ids)
        cid = correlation_id(headers, rid)
        ids = (b"x-request-id", rid.encode()), (b"x-correlation-id", cid.encode())
        client = Client(scope, send, (*ids, *CLOSED))
        with bind_request_id(rid, cid) as line:
            gateway = self._gateway
            if gateway is None:
                await client.respond(error_response(_NOT_STARTED))
                return
            request = Request(scope, receive, client, gateway, rid, headers, self._ids)
            try:
                if not gateway.edge.is_plain and await _is_answered_at_the_edge(request):
                    return
                if gateway.tracer is None:
                    await self._serve(request, line)
                else:
                    await self._serve_traced(request, line, gateway.tracer)
            except Exception as error:  # noqa: BLE001 - the border: nothing escapes as anything but an error object
                shown = public(error)
                gateway.metrics.error(shown.domain, shown.code or shown.type)
                if not isinstance(error, GatewayError):
                    log_event(_log, "http.request.crashed", level=logging.ERROR, exc_info=error)
                if not client.status:
                    response = error_response(shown, challenge=challenge(request))
                    if response.status in _LAST:
                        await client.refuse(response, headers)
                    else:
                        await client.respond(response)
            finally:
                _record(request, time.perf_counter() - started)
            if client.is_refused:
                await client.drain(receive)
            elif client.exchange is not None:
                client.exchange.cut()

    async def _serve(self, request: Request, line: LogContext) -> None:
        handler = self._enter(request, line).handler
        if handler is None:
            await self._forward(request)
            return
        response = await handler(request)
        if response is not None:
            await request.client.respond(response)

    async def _serve_traced(self, request: Request, line: LogContext, tracer: Tracer) -> None:
        """Serve inside a span; of health, metrics and the like, which are asked for all day, none is sent."""
        method, client = request.scope["method"], request.client
        method = method if method in METHODS else "_OTHER"
        attributes = {"http.request.method": method, "gateway.request_id": request.request_id}
        parent = remote_parent(request.headers.get("traceparent"))
        with Span(tracer, method, attributes, kind="server", parent=parent) as span:
            error: BaseException | None = None
            try:
                await self._serve(request, line)
            except BaseException as raised:
                error = raised
                raise
            finally:
                status = client.status or (public(error).status if isinstance(error, Exception) else 0)
                route, principal = request.route, request.principal
                span.rename(f"{method} {route.path}" if route is not None else method)
                span.set(
                    {
                        "http.route": route.path if route is not None else None,
                        "http.response.status_code": status or None,
                        "gateway.key_id": principal.key_id if principal is not None else None,
                        "gateway.correlation_id": line.correlation_id,
                    }
                )
                if route is not None and route.scope in ("public", "metrics"):
                    span.discard()
                elif isinstance(error, Exception) and status < 500:
                    span.end()  # the caller's own mistake: the server did what it should

    def _enter(self, request: Request, line: LogContext) -> Route:
        """The door: route, key, scope. A path that nothing serves still needs a key, so that probing tells nothing."""
        scope, headers, keyring = request.scope, request.headers, request.gateway.holder.current.keyring
        try:
            request.route, request.path_params = route, _ = self._table.match(scope["method"], scope["path"])
        except GatewayError:
            request.gateway.throttle.authenticate(keyring, caller(scope, headers))
            raise
        line.endpoint = route.path
        if route.scope == "public":
            return route
        request.principal = principal = request.gateway.throttle.authenticate(keyring, caller(scope, headers))
        allowed = route.scope in principal.scopes or principal.is_admin
        request.gateway.metrics.access_decided("scope", allowed)
        if not allowed:
            raise ScopeRequired(
                f"This needs a key with the scope '{route.scope}'; '{principal.key_id}' has "
                f"{', '.join(sorted(principal.scopes)) or 'none'}. Scopes stand in security.yaml."
            )
        return route

    async def _forward(self, request: Request) -> None:
        """Hand the request to FastAPI, which is built once, at its first use."""
        if self._cold is None:
            self._cold = asyncio.ensure_future(asyncio.to_thread(_build_cold, self._table))
        cold = await asyncio.shield(self._cold)
        scope, body = request.scope, await read_body(request)
        if body.strip():
            decode_body(body)  # what no route takes: no JSON, no object, a key that is there twice
        if request.route is not None and request.route.action == "service.docs":  # a page has a policy of its own
            policy = b"content-security-policy"
            request.client.headers = tuple(field for field in request.client.headers if field[0] != policy)
        given = {"gateway": request.gateway, "principal": request.principal, "request_id": request.request_id}
        # The server leaves the body of an answer to HEAD out; FastAPI's routes know GET alone.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        state = {**scope.get("state", {}), **given}
        # Bodies are JSON here as everywhere, whatever the client calls them: `curl -d` says it sends a form.
        headers = [field for field in scope["headers"] if field[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        inner = {**scope, "method": method, "state": state, "headers": headers}
        await cold(inner, _replay(body, request.receive), request.client.send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read, then whatever comes after it."""
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict[str, Any]:
        return given.pop() if given else await receive()

    return replay


async def _is_answered_at_the_edge(request: Request) -> bool:
    """Judge host, proxies and origin; a browser's question before a request is answered without a key."""
    edge, client = request.gateway.edge, request.client
    client.headers = (*client.headers[:2], *edge.headers)
    client.headers += edge.enter(request.scope, request.headers)
    answer = edge.preflight(request.scope, request.headers)
    if answer is None:
        return False
    client.headers = (*client.headers[:2], *edge.headers)
    await client.send({"type": "http.response.start", "status": 204, "headers": answer})
    await client.send({"type": "http.response.body", "body": b""})
    return True


def _record(request: Request, seconds: float) -> None:
    """Leave the traces of one answer in metrics and log."""
    scope, route, principal, status = request.scope, request.route, request.principal, request.client.status
    gateway, client, method, milliseconds = request.gateway, scope.get("client"), scope["method"], seconds * 1000
    template = route.path if route is not None else "(unknown)"
    gateway.metrics.http_request(template, method, status, milliseconds)
    gateway.endpoints.record(template, status, milliseconds, waits=route is not None and route.scope == "chat")
    _ANSWERED.log(
        [
            method,
            template,
            status,
            round(milliseconds, 2),
            principal.key_id if principal is not None else None,
            client[0] if client else None,
            request.headers.get("user-agent"),
        ]
    )


def _build_cold(table: RouteTable) -> Any:
    # Deferred on purpose: FastAPI costs 0.3 s and 30 MB, and chat needs none of it.
    return importlib.import_module("api.admin").build_app(table)


def create_app(
    settings: Settings | None = None, *, workers: Workers | None = None, own_port: int | None = None
) -> GatewayApp:
    """Return a new application; nothing is opened until its lifespan starts."""
    return GatewayApp(settings, workers=workers, own_port=own_port)


app = create_app()
