"""Requests written by hand on a socket, for tests that leave, stall or read slowly."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.support.http import HttpClient


def send_by_hand(
    gateway: HttpClient,
    body: dict[str, Any],
    *,
    key: str,
    path: str = "/v1/chat/completions",
    buffer: int | None = None,
) -> socket.socket:
    """Send a request and return the open socket; ``buffer`` is the size of its receive buffer."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    sock = socket.socket()
    sock.settimeout(60)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.connect(("127.0.0.1", gateway.port))
    sock.sendall(head.encode() + data)
    return sock


def read_until(sock: socket.socket, part: bytes) -> bytes:
    """Read until ``part`` was seen; return everything that came."""
    seen = b""
    while part not in seen:
        data = sock.recv(65536)
        assert data, seen
        seen += data
    return seen
