"""The OpenAPI document: FastAPI's own routes and the plain ones, from the one route table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute

from api.admin.bodies import BODIES, PARAMETERS, body_schemas
from api.admin.schemas import ANSWERS, COMPONENTS
from api.routing import Route, RouteTable
from gateway import __version__

_DESCRIPTION = (
    "Agents of the OpenAI Agents SDK, served as models of an OpenAI-compatible API. Every answer carries "
    '`x-request-id`; every error is `{"error": {message, type, param, code}}`.'
)


def build_document(table: RouteTable, routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the document; ``routes`` are those of the FastAPI application."""
    document = get_openapi(title="Agent Gateway", version=__version__, description=_DESCRIPTION, routes=routes)
    document["tags"] = [{"name": name} for name in dict.fromkeys(_tag(route) for route in table.routes)]
    components = document.setdefault("components", {})
    components["schemas"] = {**body_schemas(), **COMPONENTS, **_without_validation(components.get("schemas", {}))}
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"bearer": []}, {"x-api-key": []}]
    paths = document.setdefault("paths", {})
    for route in table.routes:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", route.path)
        known = paths.setdefault(path, {}).get(route.method.lower())
        paths[path][route.method.lower()] = _operation(route, known)
    return document


def _operation(route: Route, known: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [_tag(route)],
        "summary": route.summary,
        "operationId": route.action,
        **(known or {}),
    }
    operation["x-required-scope"] = route.scope
    if route.scope == "public":
        operation["security"] = []
    names = re.findall(r"\{(\w+)(?::path)?\}", route.path)
    if names or route.action in PARAMETERS:
        path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        operation["parameters"] = [*path, *PARAMETERS.get(route.action, [])]
    if route.action in BODIES:
        required, content = BODIES[route.action]
        operation["requestBody"] = {
            "required": required,
            "content": {kind: {"schema": schema} for kind, schema in content.items()},
        }
    answers = {status: answer for status, answer in (known or {}).get("responses", {}).items() if status != "422"}
    answers |= ANSWERS.get(route.action, {})
    if not answers:
        answers["200"] = {"description": "The upstream's answer, as it came.", "content": {"*/*": {}}}
    answers["default"] = {
        "description": "An error, with its own status.",
        "content": _json_content("#/components/schemas/Error"),
    }
    operation["responses"] = answers
    return operation


def _without_validation(schemas: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's own error shapes never leave this gateway."""
    return {name: schema for name, schema in schemas.items() if name not in ("HTTPValidationError", "ValidationError")}


def _json_content(ref: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": ref}}}


def _tag(route: Route) -> str:
    return route.action.partition(".")[0]
