"""The route table finds one row per method and path, and nothing by prefix or suffix."""

from __future__ import annotations

import pytest

from api.routing import Request, Response, Route, RouteTable
from gateway.errors import MethodNotAllowed, NotFound


async def _handler(_: Request) -> Response:
    return Response(b"")


TABLE = RouteTable(
    [
        Route("GET", "/v1/models", "models.list", "chat", "", _handler, ("/models",)),
        Route("GET", "/v1/models/{model:path}", "models.get", "chat", "", _handler, ("/models/{model:path}",)),
        Route("POST", "/v1/models/{model:path}", "test.c", "admin", "", _handler),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "action", "params"),
    [
        ("GET", "/v1/models", "models.list", {}),
        ("HEAD", "/models", "models.list", {}),
        ("GET", "/v1/models/ns/x", "models.get", {"model": "ns/x"}),
        ("GET", "/models/x", "models.get", {"model": "x"}),
        ("GET", "/v1/models/a\nb", "models.get", {"model": "a\nb"}),
        ("POST", "/v1/models/x", "test.c", {"model": "x"}),
    ],
)
def test_a_path_has_one_row(method: str, path: str, action: str, params: dict[str, str]) -> None:
    route, found = TABLE.match(method, path)
    assert (route.action, dict(found)) == (action, params)


@pytest.mark.parametrize("path", ["/", "/v1/models/", "/v1/model", "/v1/modelsx", "//v1/models", "/V1/models", ""])
def test_a_path_that_is_not_a_row_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        TABLE.match("GET", path)


def test_another_method_is_refused_with_what_would_do() -> None:
    with pytest.raises(MethodNotAllowed, match="GET"):
        TABLE.match("DELETE", "/v1/models")


def test_the_same_row_twice_is_a_mistake_of_ours() -> None:
    row = Route("GET", "/x", "x.get", "chat", "", _handler)
    with pytest.raises(ValueError, match="two routes"):
        RouteTable([row, row])
