"""The route table's parts: a Route row, what a handler is given, and what it gives back."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from gateway.errors import MethodNotAllowed, NotFound
from gateway.ids import RandomIds
from gateway.principal import Principal

if TYPE_CHECKING:  # the composition root imports this module
    from api.bootstrap import Gateway
    from api.client import Client

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

RequiredScope = Literal["public", "chat", "metrics", "admin"]

_ACTION = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")


@dataclass(slots=True)
class Request:
    """One HTTP request. ``headers`` has lower-case names; the last of a repeated one wins.

    ``route``, ``principal`` and ``path_params`` are there once it has passed the door.
    """

    scope: Scope
    receive: Receive
    client: Client
    gateway: Gateway
    request_id: str
    headers: Mapping[str, str]
    ids: RandomIds = field(default_factory=RandomIds)
    route: Route | None = None
    principal: Principal | None = None
    path_params: Mapping[str, str] = field(default_factory=dict)

    @property
    def send(self) -> Send:
        """The ASGI way to the client."""
        return self.client.send

    @property
    def caller(self) -> Principal:
        """The principal of a route that is not public."""
        assert self.principal is not None, "a public route has no caller"
        return self.principal


@dataclass(slots=True)
class Response:
    """A whole answer; streaming handlers send for themselves and return None."""

    body: bytes
    status: int = 200
    content_type: bytes = b"application/json"
    headers: Headers = ()


Handler = Callable[[Request], Awaitable[Response | None]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the route table.

    ``path`` may end in ``{name:path}`` (one or more segments, slashes included). ``action`` is the stable name that
    policy speaks of. ``scope`` is what a key needs; ``public`` needs no key. A row without ``handler`` is served by
    the FastAPI application behind the dispatcher. ``aliases`` answer alike and stay out of the OpenAPI document.
    """

    method: str
    path: str
    action: str
    scope: RequiredScope
    summary: str
    handler: Handler | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise `ValueError` for a row that policy could not judge."""
        if self.scope not in get_args(RequiredScope):
            raise ValueError(f"{self.method} {self.path} has no scope that a key can have: {self.scope!r}")
        if not _ACTION.fullmatch(self.action):
            raise ValueError(f"{self.method} {self.path} has no action: {self.action!r}")


class RouteTable:
    """Finds the row for a method and a path; exact paths by one dictionary look-up."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], str, dict[str, Route]]] = []
        for route in self.routes:
            for path in (route.path, *route.aliases):
                self._add(path, route)

    def match(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """Return the row and the path parameters; raise `NotFound` or `MethodNotAllowed`."""
        methods, params = self._exact.get(path), dict[str, str]()
        if methods is None:
            for pattern, _, candidates in self._patterns:
                found = pattern.fullmatch(path)
                if found:
                    methods, params = candidates, found.groupdict()
                    break
        if methods is None:
            raise NotFound(f"Nothing answers at {path[:200]}. The API is described at /docs.")
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            raise MethodNotAllowed(
                f"{path[:200]} answers {' and '.join(sorted(methods))}, not {method}.", allow=tuple(sorted(methods))
            )
        return route, params

    def _add(self, path: str, route: Route) -> None:
        if "{" not in path:
            methods = self._exact.setdefault(path, {})
        else:
            source = re.sub(r"\{(\w+):path\}", r"(?P<\1>.+)", path)
            source = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", source)
            for _, known, candidates in self._patterns:
                if known == source:
                    methods = candidates
                    break
            else:
                methods = {}
                self._patterns.append((re.compile(source, re.DOTALL), source, methods))
        if route.method in methods:
            raise ValueError(f"two routes for {route.method} {path}")
        methods[route.method] = route
