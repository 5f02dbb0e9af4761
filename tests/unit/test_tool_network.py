"""Where tools may go: the address that is connected to is one that was judged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpcore2
import pytest

from gateway.errors import ConfigError, ToolDenied
from gateway.tools.config import NetworkAccess
from gateway.tools.network import AddressGuard, open_pool

INSIDE = (
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::1", "::", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808",
    "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0",
    "ff02::1", "2001:db8::1", "nonsense",
)  # fmt: skip
OUTSIDE = ("1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_refused(address: str) -> None:
    assert not AddressGuard(NetworkAccess()).allows("a.example", address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_a_public_address_is_allowed(address: str) -> None:
    assert AddressGuard(NetworkAccess()).allows("a.example", address)


def test_the_operator_opens_networks_and_names() -> None:
    guard = AddressGuard(NetworkAccess(allow_private=("10.1.0.0/16", "orders.internal", "fd12::/16")))
    assert guard.allows("a.example", "10.1.2.3")
    assert guard.allows("a.example", "::ffff:10.1.2.3")
    assert guard.allows("a.example", "fd12::5")
    assert not guard.allows("a.example", "10.2.0.1")
    assert guard.allows("Orders.Internal.", "192.168.0.9")
    assert not guard.allows("evil-orders.internal", "192.168.0.9")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.0/33"):
        AddressGuard(NetworkAccess(allow_private=("10.0.0.0/33",)))


@pytest.mark.anyio
async def test_a_name_that_changes_its_mind_is_asked_once_per_connection() -> None:
    """DNS rebinding: what was judged is what is connected to, and a mixed answer is refused whole."""
    reached = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    answers: list[Sequence[str]] = [("203.0.113.7", "127.0.0.1"), ("127.0.0.1",), ()]
    asked: list[str] = []

    async def resolve(host: str, _: int) -> Sequence[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    async with server, open_pool(NetworkAccess(), resolve=resolve) as pool:
        for _ in answers:
            with pytest.raises(ToolDenied, match="private network"):
                await pool.request("GET", f"http://rebind.example:{port}/")
        assert asked == ["rebind.example"] * 3
        assert not reached.is_set()


@pytest.mark.anyio
async def test_the_guard_connects_to_the_address_it_judged() -> None:
    """The name is never resolved again: it does not exist, and the request arrives all the same."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(head), head))
        await writer.drain()
        writer.close()

    async def resolve(host: str, _: int) -> Sequence[str]:
        return ("127.0.0.1",)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    access = NetworkAccess(allow_private=("127.0.0.1/32",))
    async with server, open_pool(access, resolve=resolve) as pool:
        answer: Any = await pool.request("GET", f"http://orders.invalid:{port}/x")
        assert b"host: orders.invalid" in answer.content.lower()


@pytest.mark.anyio
async def test_local_sockets_are_none_of_a_tools_business() -> None:
    async with open_pool(NetworkAccess()) as pool:
        backend: httpcore2.AsyncNetworkBackend = pool._network_backend
        with pytest.raises(ToolDenied):
            await backend.connect_unix_socket("/var/run/docker.sock")
