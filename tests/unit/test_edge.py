"""Tables of the edge: which page may call, which host is answered for, which forwarded address is believed."""

from __future__ import annotations

from typing import Any

import pytest

from api.edge import Edge
from gateway.config import Settings
from gateway.errors import ConfigError, InvalidRequest


def scope(
    *, method: str = "GET", path: str = "/v1/models", peer: str = "203.0.113.9", forwarded: tuple[str, ...] = ()
) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    return {"method": method, "path": path, "client": (peer, 4711), "scheme": "http", "headers": headers}


def granted(edge: Edge, origin: str) -> dict[bytes, bytes]:
    return dict(edge.enter(scope(), {"origin": origin, "host": "x"}))


ALLOW, CREDENTIALS = b"access-control-allow-origin", b"access-control-allow-credentials"


@pytest.mark.parametrize(
    ("setting", "origin", "allowed", "credentials"),
    [
        (("https://app.example.com",), "https://app.example.com", b"https://app.example.com", True),
        (("https://app.example.com/",), "https://app.example.com", b"https://app.example.com", True),
        (("https://app.example.com",), "https://evil.example.com", None, False),
        (("https://app.example.com",), "http://app.example.com", None, False),
        (("https://app.example.com",), "https://app.example.com.evil.com", None, False),
        (("https://app.example.com",), "null", None, False),
        (("*",), "https://anything.example", b"*", False),
        (("*", "https://app.example.com"), "https://app.example.com", b"https://app.example.com", True),
        (("*", "https://app.example.com"), "https://other.example.com", b"*", False),
        ((), "https://app.example.com", None, False),
    ],
)
def test_which_page_may_call(setting: tuple[str, ...], origin: str, allowed: bytes | None, credentials: bool) -> None:
    headers = granted(Edge.of(Settings(cors_origins=setting)), origin)
    assert headers.get(ALLOW) == allowed
    assert (headers.get(CREDENTIALS) == b"true") is credentials
    if allowed is not None:
        assert b"x-request-id" in headers[b"access-control-expose-headers"]
        assert b"x-routing-agent" in headers[b"access-control-expose-headers"]


def test_a_preflight_is_answered_for_known_origins_alone() -> None:
    edge = Edge.of(Settings(cors_origins=("https://app.example.com",)))
    asked = {
        "origin": "https://app.example.com",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answer = dict(edge.preflight(scope(method="OPTIONS"), asked) or ())
    assert answer[ALLOW] == b"https://app.example.com"
    assert b"POST" in answer[b"access-control-allow-methods"]
    assert answer[b"access-control-allow-headers"] == b"authorization, content-type"
    assert edge.preflight(scope(method="OPTIONS"), asked | {"origin": "https://evil.example"}) is None
    assert edge.preflight(scope(method="GET"), asked) is None
    assert edge.preflight(scope(method="OPTIONS"), {"origin": "https://app.example.com"}) is None
    odd = dict(edge.preflight(scope(method="OPTIONS"), asked | {"access-control-request-headers": "a\r\nb: c"}) or ())
    assert b"access-control-allow-headers" not in odd


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("api.example.com", True),
        ("API.Example.com:8443", True),
        ("deep.tools.example.com", True),
        ("tools.example.com", False),
        ("eviltools.example.com", False),
        ("api.example.com.evil.com", False),
        ("[::1]:8000", True),
        ("", False),
    ],
)
def test_which_host_is_answered_for(host: str, served: bool) -> None:
    edge = Edge.of(Settings(trusted_hosts=("api.example.com", "*.tools.example.com", "::1")))
    if served:
        edge.enter(scope(), {"host": host})
    else:
        with pytest.raises(InvalidRequest, match="GATEWAY_TRUSTED_HOSTS"):
            edge.enter(scope(), {"host": host})
    edge.enter(scope(path="/readyz"), {"host": host})


@pytest.mark.parametrize(
    ("peer", "forwarded", "believed"),
    [
        ("10.0.0.1", ("198.51.100.7",), "198.51.100.7"),
        ("10.0.0.1", ("1.1.1.1, 198.51.100.7",), "198.51.100.7"),  # the left part is the client's own word
        ("10.0.0.1", ("1.1.1.1", "198.51.100.7"), "198.51.100.7"),
        ("10.0.0.1", ("198.51.100.7, 10.2.3.4",), "198.51.100.7"),  # two proxies of ours
        ("10.0.0.1", ("10.9.9.9",), "10.9.9.9"),
        ("10.0.0.1", ("198.51.100.7:5555",), "198.51.100.7"),
        ("10.0.0.1", ("[2001:db8::1]:5555",), "2001:db8::1"),
        ("10.0.0.1", ("198.51.100.7, unknown",), "10.0.0.1"),
        ("10.0.0.1", ("127.0.0.1, 198.51.100.7",), "198.51.100.7"),
        ("10.0.0.1", (), "10.0.0.1"),
        ("203.0.113.9", ("127.0.0.1",), "203.0.113.9"),  # not a proxy of ours: a spoof
        ("::ffff:10.0.0.1", ("198.51.100.7",), "198.51.100.7"),
    ],
)
def test_which_forwarded_address_is_believed(peer: str, forwarded: tuple[str, ...], believed: str) -> None:
    edge = Edge.of(Settings(trusted_proxies=("10.0.0.0/8",)))
    given = scope(peer=peer, forwarded=forwarded)
    edge.enter(given, {"host": "x"})
    assert given["client"][0] == believed


def test_nobody_is_believed_by_default() -> None:
    given = scope(peer="127.0.0.1", forwarded=("198.51.100.7",))
    edge = Edge.of(Settings())
    assert edge.is_plain
    edge.enter(given, {"host": "x"})
    assert given["client"][0] == "127.0.0.1"


def test_the_scheme_of_a_trusted_proxy_and_transport_security() -> None:
    edge = Edge.of(Settings(environment="production", trusted_proxies=("10.0.0.1",)))
    for peer, expected in (("10.0.0.1", True), ("203.0.113.9", False)):
        given = scope(peer=peer)
        given["headers"].append((b"x-forwarded-proto", b"https"))
        assert (b"strict-transport-security" in dict(edge.enter(given, {"host": "x"}))) is expected
    development = Edge.of(Settings(trusted_proxies=("10.0.0.1",)))
    given = scope(peer="10.0.0.1")
    given["headers"].append((b"x-forwarded-proto", b"https"))
    assert b"strict-transport-security" not in dict(development.enter(given, {"host": "x"}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(cors_origins=("app.example.com",)), "GATEWAY_CORS_ORIGINS"),
        (Settings(cors_origins=("https://app.example.com/path",)), "GATEWAY_CORS_ORIGINS"),
        (Settings(trusted_hosts=("https://x",)), "GATEWAY_TRUSTED_HOSTS"),
        (Settings(trusted_proxies=("10.0.0.0/99",)), "GATEWAY_TRUSTED_PROXIES"),
    ],
)
def test_a_wrong_setting_is_named(settings: Settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Edge.of(settings)
