"""HTTP for tools that cannot reach inside: a name is resolved once, judged, and only what was judged is connected to.

The guard stands where sockets are opened, below the connection pool: whatever a URL spells (``0177.0.0.1``,
``2130706433``, a name whose answers change), the address that is connected to is one that was looked at.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import httpcore2

from gateway.errors import ConfigError, ToolDenied
from gateway.tools.config import NetworkAccess

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host and a port to its addresses as text."""

_MOST_ADDRESSES = 4
_METADATA = frozenset(
    map(ipaddress.ip_address, ("168.63.129.16", "169.254.169.254", "100.100.100.200", "fd00:ec2::254"))
)
"""Where clouds answer questions about the machine; the first is a public address."""

_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.31.196.0/24", "192.88.99.0/24", "192.175.48.0/24", "2001::/23", "3fff::/20", "5f00::/16"),
    )
)
"""Of IANA's special purposes, what Python's `is_global` lets pass."""

_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.IPv6Network("::/96")


class AddressGuard:
    """What `NetworkAccess` allows: public addresses, and what the operator lists."""

    def __init__(self, access: NetworkAccess) -> None:
        """Raise `ConfigError` for an entry that is neither a network nor a host name."""
        self._hosts: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for text in access.allow_private:
            try:
                self._networks.append(ipaddress.ip_network(text))
            except ValueError as error:
                if "/" in text or not text.strip() or not text.isascii():
                    raise ConfigError(
                        f"network: allow_private: {text!r} is neither a network (10.0.0.0/8) nor a host name."
                    ) from error
                self._hosts.add(text.lower().rstrip("."))

    def allows(self, host: str, address: str) -> bool:
        """Return whether a connection to ``address``, found under the name ``host``, may be opened."""
        found = _parsed(address)
        if found is None:
            return False
        if host.lower().rstrip(".") in self._hosts:
            return True
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        meant = [mapped] if mapped is not None else [found, *_embedded(found)]
        return all(is_public(item) or any(item in network for network in self._networks) for item in meant)


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the open internet: not to this machine, its networks or its cloud."""
    if address in _METADATA or address.is_multicast or address.is_reserved:
        return False
    if any(address in network for network in _SPECIAL):
        return False
    return address.is_global and not address.is_unspecified


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens sockets to addresses that its guard allows; raises `ToolDenied` for others."""

    def __init__(self, guard: AddressGuard, *, resolve: Resolve | None = None) -> None:
        self._guard = guard
        self._resolve = resolve or resolve_host
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the port of httpcore2
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """See `httpcore2.AsyncNetworkBackend`."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout("the name was not resolved in time") from error
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError("the name cannot be resolved") from error
        # One bad address among good ones is how a rebinding name looks: all of them must pass.
        if not addresses or not all(self._guard.allows(host, address) for address in addresses):
            raise ToolDenied(
                "The tool's address lies inside a private network, where tools may not go. Its operator can list it "
                "under network.allow_private in tools.yaml."
            )
        failure: Exception = httpcore2.ConnectError("no address")
        for address in list(dict.fromkeys(addresses))[:_MOST_ADDRESSES]:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - the port of httpcore2
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: tools have no business with local sockets."""
        raise ToolDenied("A tool cannot reach a local socket.")

    async def sleep(self, seconds: float) -> None:
        """See `httpcore2.AsyncNetworkBackend`."""
        await asyncio.sleep(seconds)


def open_pool(
    access: NetworkAccess, *, max_connections: int = 16, resolve: Resolve | None = None
) -> httpcore2.AsyncConnectionPool:
    """Return a guarded connection pool; whoever opens it closes it. Raises `ConfigError` for a wrong ``access``."""
    return httpcore2.AsyncConnectionPool(
        ssl_context=tls_context(access),
        max_connections=max_connections,
        max_keepalive_connections=max_connections,
        keepalive_expiry=15.0,
        http1=True,
        http2=False,
        retries=0,
        network_backend=GuardedBackend(AddressGuard(access), resolve=resolve),
    )


def tls_context(access: NetworkAccess) -> ssl.SSLContext:
    """Return the TLS settings of tools' connections."""
    try:
        context = ssl.create_default_context(cafile=access.ca_file)
    except OSError as error:
        raise ConfigError(f"network: ca_file: {access.ca_file!r} cannot be read.") from error
    if not access.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """Return every address of a host as the system resolves it; numbers in odd notations become what they mean."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]


def _parsed(address: str) -> Address | None:
    try:
        return ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None


def _embedded(address: Address) -> list[Address]:
    """Return the IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner: list[Address | None] = [address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in _NAT64) or address in _COMPATIBLE:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [item for item in inner if item is not None]
