"""One error shape, whoever failed: OpenAI's four fields, always text or null."""

from __future__ import annotations

import json

import pytest

from api.errors import error_object, error_response, public
from gateway.errors import ApprovalRequired, GatewayError, MethodNotAllowed, Unauthenticated, UpstreamRejected


def relayed(upstream_error: dict[str, object]) -> dict[str, object]:
    error = UpstreamRejected("ours", param="messages", code="ours")
    error.upstream_error, error.is_relayed = upstream_error, True
    shown: dict[str, object] = error_object(error)["error"]
    return shown


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"message": "no", "type": "t", "param": "p", "code": "c"}, ("no", "t", "p", "c")),
        (
            {"message": "no", "type": None, "param": None, "code": None},
            ("no", "invalid_request_error", "messages", "ours"),
        ),
        ({"message": "no", "code": 429}, ("no", "invalid_request_error", "messages", "429")),
        ({"message": {"detail": [1]}}, ('{"detail":[1]}', "invalid_request_error", "messages", "ours")),
        ({}, ("ours", "invalid_request_error", "messages", "ours")),
    ],
)
def test_what_an_upstream_said_fits_the_official_shape(
    theirs: dict[str, object], expected: tuple[str, str, str, str]
) -> None:
    shown = relayed(theirs)
    assert (shown["message"], shown["type"], shown["param"], shown["code"]) == expected


def test_further_fields_of_an_upstream_stay() -> None:
    assert relayed({"message": "no", "inner": {"a": 1}})["inner"] == {"a": 1}


def test_headers_say_what_to_do_next() -> None:
    assert dict(error_response(Unauthenticated("x")).headers) == {b"www-authenticate": b"Bearer"}
    assert dict(error_response(ApprovalRequired("x")).headers) == {b"x-should-retry": b"false"}
    assert dict(error_response(GatewayError("x", retry_after_s=0.2)).headers) == {b"retry-after": b"1"}
    assert b"allow" in dict(error_response(MethodNotAllowed("x", allow=("GET",))).headers)


def test_what_the_gateway_cannot_explain_is_a_plain_500() -> None:
    response = error_response(public(ValueError("canary")))
    assert response.status == 500
    assert b"canary" not in response.body
    assert json.loads(response.body)["error"]["code"] == "internal_error"
