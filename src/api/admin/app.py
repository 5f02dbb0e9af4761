"""The FastAPI application behind the dispatcher: one endpoint per row of the route table that has no plain handler.

The dispatcher has already authenticated the caller and checked the scope; it puts ``gateway``, ``principal`` and
``request_id`` into the state of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.admin import agents, security, upstreams
from api.admin.explorer import explorer_response
from api.admin.openapi import build_document
from api.errors import error_response, public
from api.routing import RouteTable
from gateway.errors import GatewayError, InvalidRequest, MethodNotAllowed, NotFound

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway


def build_app(table: RouteTable) -> FastAPI:
    """Return the application for the rows of ``table`` without a handler; raises `KeyError` for a row unknown here."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(GatewayError, _explain)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(Exception, _explain)

    async def openapi() -> Response:
        """The OpenAPI document of every route, plain or FastAPI's."""
        if not document:
            document.append(msgspec.json.encode(await asyncio.to_thread(build_document, table, app.routes)))
        return Response(document[0], media_type="application/json")

    document: list[bytes] = []
    endpoints: dict[str, Callable[..., Any]] = {
        "agents.list": agents.list_agents,
        "agents.refresh": agents.refresh_agents,
        "agents.errors": agents.list_errors,
        "upstreams.list": upstreams.list_upstreams,
        "upstreams.refresh": upstreams.refresh_upstreams,
        "security.refresh": security.refresh_security,
        "security.preview": security.preview,
        "security.overrides.list": security.list_overrides,
        "security.overrides.create": security.make_override,
        "security.overrides.delete": security.revoke_override,
        "service.docs": explorer_response,
        "service.openapi": openapi,
    }
    for route in table.routes:
        if route.handler is not None:
            continue
        for path in (route.path, *route.aliases):
            app.add_api_route(
                path,
                endpoints[route.action],
                methods=[route.method],
                operation_id=route.action,
                summary=route.summary,
                tags=[route.action.partition(".")[0]],
                include_in_schema=path == route.path and not route.action.startswith("service."),
            )
    return app


async def _explain(request: Request, error: Exception) -> Response:
    """Answer with the error object of every other surface, and count it the same way."""
    translated = _translate(error)
    shown = public(translated)
    if isinstance(translated, GatewayError):  # what nobody foresaw is raised again, and counted by the dispatcher
        cast("Gateway", request.state.gateway).metrics.error(shown.domain, shown.code or shown.type)
    answer = error_response(shown)
    response = Response(answer.body, answer.status, media_type="application/json")
    response.raw_headers.extend(answer.headers)
    return response


def _translate(error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        if not where:
            return InvalidRequest("The request needs a body: a JSON object. The API is described at /docs.")
        return InvalidRequest(f"Invalid value for '{where}': {first['msg']}.", param=where)
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            return MethodNotAllowed("This path does not answer that method. The API is described at /docs.")
        if error.status_code == 404:
            return NotFound("Nothing answers at this path. The API is described at /docs.")
        return InvalidRequest(str(error.detail), status=error.status_code)
    return error
