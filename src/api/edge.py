"""The edge of the product: which hosts it answers for, whom it believes about the client, which web pages may call it.

All of it is a setting and off by default; the headers that make an answer harmless to a browser are always there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from api.routing import Headers, Scope
from gateway.config import Settings
from gateway.errors import ConfigError, InvalidRequest

SAFE: Headers = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
CLOSED: Headers = (*SAFE, (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"))
"""What every answer carries; a page (`/docs`) brings a content policy of its own instead of the last."""

_HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")
_EXPOSED = ", ".join(
    (
        "mcp-session-id",
        "retry-after",
        "www-authenticate",
        "x-correlation-id",
        "x-gateway-attempts",
        "x-gateway-cost-reported",
        "x-gateway-cost-usd",
        "x-gateway-hedged",
        "x-gateway-upstream",
        "x-gateway-usage-estimated",
        "x-ratelimit-limit-requests",
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-requests",
        "x-ratelimit-reset-tokens",
        "x-request-id",
        "x-routing-agent",
        "x-routing-confidence",
        "x-routing-decision-id",
        "x-routing-tier",
        "x-should-retry",
    )
).encode()
_METHODS = b"GET, POST, PUT, PATCH, DELETE"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[?[0-9a-f:.]+\]?")
_ASKED = re.compile(r"[A-Za-z0-9-]{1,64}(?:\s*,\s*[A-Za-z0-9-]{1,64}){0,49}")
_PROBES = frozenset({"/health", "/healthz", "/readyz"})
"""Asked by address, by whoever looks after the process; they tell nothing."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Edge:
    """The settings of the edge, checked. ``is_plain`` is set where there is nothing to do but add headers."""

    origins: frozenset[str] = frozenset()
    any_origin: bool = False
    hosts: tuple[str, ...] = ()
    proxies: tuple[_Network, ...] = ()
    headers: Headers = CLOSED
    is_production: bool = False
    is_plain: bool = field(default=True)

    @classmethod
    def of(cls, settings: Settings) -> Edge:
        """Read the settings; raise `ConfigError` for an origin, host or network that is none."""
        origins = tuple(origin.lower().rstrip("/") for origin in settings.cors_origins)
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"GATEWAY_CORS_ORIGINS has {origin!r}, which is no origin; write https://app.example.com, or *."
                )
        hosts = tuple(host.lower() for host in settings.trusted_hosts if host != "*")
        for host in hosts:
            if not _NAME.fullmatch(host):
                raise ConfigError(
                    f"GATEWAY_TRUSTED_HOSTS has {host!r}; write host names without a port, *.example.com for all below."
                )
        proxies = tuple(_network(text) for text in settings.trusted_proxies)
        if "*" in settings.trusted_hosts:
            hosts = ()
        is_production = not settings.is_development
        return cls(
            origins=frozenset(origins) - {"*"},
            any_origin="*" in origins,
            hosts=hosts,
            proxies=proxies,
            headers=(*CLOSED, (b"vary", b"origin")) if origins else CLOSED,
            is_production=is_production,
            is_plain=not (origins or hosts or proxies or is_production),
        )

    def enter(self, scope: Scope, headers: Mapping[str, str]) -> Headers:
        """Judge a request and return the headers of its answer beside `headers`.

        The scope then has the client's own address and scheme. Raises `InvalidRequest` for a host not served here.
        """
        if self.proxies:
            self._believe(scope)
        if self.hosts and scope["path"] not in _PROBES and not self._serves(headers.get("host", "")):
            raise InvalidRequest(
                "This gateway does not answer for the host of the request. Hosts stand in GATEWAY_TRUSTED_HOSTS.",
                code="untrusted_host",
            )
        more: list[tuple[bytes, bytes]] = []
        if self.is_production and scope["scheme"] == "https":
            more.append(_HSTS)
        origin = headers.get("origin")
        if origin is not None and self._allows(origin):
            more += self._grant(origin)
            more.append((b"access-control-expose-headers", _EXPOSED))
        return tuple(more)

    def preflight(self, scope: Scope, headers: Mapping[str, str]) -> Headers | None:
        """Return the headers that answer a browser's question before a request; None where it asks nothing."""
        origin = headers.get("origin")
        if (
            scope["method"] != "OPTIONS"
            or origin is None
            or "access-control-request-method" not in headers
            or not self._allows(origin)
        ):
            return None
        asked = headers.get("access-control-request-headers", "")
        answer = [*self._grant(origin), (b"access-control-allow-methods", _METHODS)]
        if _ASKED.fullmatch(asked):
            answer.append((b"access-control-allow-headers", asked.encode()))
        answer += [(b"access-control-max-age", b"600"), (b"content-length", b"0")]
        return tuple(answer)

    def _allows(self, origin: str) -> bool:
        return self.any_origin or origin.lower() in self.origins

    def _grant(self, origin: str) -> list[tuple[bytes, bytes]]:
        """Credentials are for origins that are named; for those that only `*` lets in there are none."""
        if origin.lower() in self.origins:
            named = (b"access-control-allow-origin", origin.encode("latin-1"))
            return [named, (b"access-control-allow-credentials", b"true")]
        return [(b"access-control-allow-origin", b"*")]

    def _serves(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host.lower()).strip("[]")
        return any(
            name.endswith(known[1:]) if known.startswith("*.") else name == known.strip("[]") for known in self.hosts
        )

    def _believe(self, scope: Scope) -> None:
        """Take the client's address and scheme from a proxy's headers, so far as declared proxies wrote them."""
        client = scope.get("client")
        if client is None or not self._trusts(client[0]):
            return
        written = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        hops = [hop.strip() for hop in ",".join(written).split(",") if hop.strip()]
        for hop in reversed(hops):
            address = _address(hop)
            if address is None:
                break
            scope["client"] = (address, 0)
            if not self._trusts(address):
                break
        schemes = [value.strip().lower() for name, value in scope["headers"] if name == b"x-forwarded-proto"]
        if len(schemes) == 1 and schemes[0] in (b"http", b"https"):
            scope["scheme"] = schemes[0].decode()

    def _trusts(self, text: str) -> bool:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address.version == network.version and address in network for network in self.proxies)


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"GATEWAY_TRUSTED_PROXIES has {text!r}, which is no address or network; write 10.0.0.0/8 or 192.0.2.7."
        ) from error


def _address(hop: str) -> str | None:
    """Return the address of one entry of ``X-Forwarded-For``, which may carry a port."""
    bare = hop
    if hop.startswith("["):
        bare = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        bare = hop.partition(":")[0]
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        return None


def exposed_headers() -> Sequence[str]:
    """Return the names of the headers that pages of other origins may read."""
    return _EXPOSED.decode().split(", ")
