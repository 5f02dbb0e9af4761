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
from api.dependencies import caller, read_headers, request_id
from api.draining import draining
from api.errors import error_response, public
from api.route_table import TABLE
from api.routing import Receive, Request, Response, Route, RouteTable, Scope, Send
from gateway.config import Settings
from gateway.errors import ConfigError, GatewayError, ScopeRequired, ServiceUnavailable
from gateway.observability.logs import bind_request_id, log_event
from gateway.principal import Principal

_log = logging.getLogger("api")

_NOT_STARTED = ServiceUnavailable(
    "The gateway is not running: its server must start it (ASGI lifespan), and has not, or has stopped it again."
)


class GatewayApp:
    """The product as one ASGI 3 application; ``settings`` default to the environment, read at start-up."""

    def __init__(self, settings: Settings | None = None, table: RouteTable = TABLE) -> None:
        self._settings = settings
        self._table = table
        self._gateway: Gateway | None = None
        self._cold: asyncio.Future[Any] | None = None

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
                self._gateway = await stack.enter_async_context(open_gateway(settings))
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
        rid = request_id(headers)
        status = 0
        route: Route | None = None
        principal: Principal | None = None
        id_header = (b"x-request-id", rid.encode())

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        with bind_request_id(rid):
            gateway = self._gateway
            if gateway is None:
                await _respond(send_with_id, error_response(_NOT_STARTED), closing=True)
                return
            try:
                route, principal, params = self._enter(gateway, scope, headers)
                if route.handler is None:
                    await self._forward(gateway, principal, rid, scope, receive, send_with_id)
                else:
                    request = Request(scope, receive, send_with_id, gateway, rid, headers, principal, params)
                    response = await route.handler(request)
                    if response is not None:
                        await _respond(send_with_id, response)
            except Exception as error:  # noqa: BLE001 - the border: nothing escapes as anything but an error object
                shown = public(error)
                gateway.metrics.error(shown.domain, shown.code or shown.type)
                if not isinstance(error, GatewayError):
                    log_event(_log, "http.request.crashed", level=logging.ERROR, exc_info=error)
                if not status:
                    await _respond(send_with_id, error_response(shown), closing=True)
            finally:
                seconds = time.perf_counter() - started
                template = route.path if route else "(unknown)"
                gateway.metrics.http_request(template, scope["method"], status, seconds)
                client = scope.get("client")
                log_event(
                    _log,
                    "http.request",
                    method=scope["method"],
                    path=template,
                    status=status,
                    duration_ms=round(seconds * 1000, 2),
                    key_id=principal.key_id if principal else None,
                    client_ip=client[0] if client else None,
                    user_agent=headers.get("user-agent"),
                )

    def _enter(self, gateway: Gateway, scope: Scope, headers: dict[str, str]) -> tuple[Route, Principal | None, Any]:
        """The door: route, key, scope. A path that nothing serves still needs a key, so that probing tells nothing."""
        try:
            route, params = self._table.match(scope["method"], scope["path"])
        except GatewayError:
            gateway.holder.current.keyring.authenticate(caller(scope, headers))
            raise
        if route.scope == "public":
            return route, None, params
        principal = gateway.holder.current.keyring.authenticate(caller(scope, headers))
        if route.scope not in principal.scopes and not principal.is_admin:
            raise ScopeRequired(
                f"This needs a key with the scope '{route.scope}'; '{principal.key_id}' has "
                f"{', '.join(sorted(principal.scopes)) or 'none'}. Scopes stand in security.yaml."
            )
        return route, principal, params

    async def _forward(
        self, gateway: Gateway, principal: Principal | None, rid: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Hand the request to FastAPI, which is built once, at its first use."""
        if self._cold is None:
            self._cold = asyncio.ensure_future(asyncio.to_thread(_build_cold, self._table))
        cold = await asyncio.shield(self._cold)
        state = {**scope.get("state", {}), "gateway": gateway, "principal": principal, "request_id": rid}
        # The server leaves the body of an answer to HEAD out; FastAPI's routes know GET alone.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await cold({**scope, "method": method, "state": state}, receive, send)


def _build_cold(table: RouteTable) -> Any:
    # Deferred on purpose: FastAPI costs 0.3 s and 30 MB, and chat needs none of it.
    return importlib.import_module("api.admin").build_app(table)


async def _respond(send: Send, response: Response, *, closing: bool = False) -> None:
    headers = [
        (b"content-type", response.content_type),
        (b"content-length", str(len(response.body)).encode()),
        *response.headers,
    ]
    if closing and response.status in (401, 408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


def create_app(settings: Settings | None = None) -> GatewayApp:
    """Return a new application; nothing is opened until its lifespan starts."""
    return GatewayApp(settings)


app = create_app()
