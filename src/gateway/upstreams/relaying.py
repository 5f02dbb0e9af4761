"""Requests that are relayed as bytes, and what of an upstream's answer head a client is shown."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

OnHead = Callable[[int, Mapping[bytes, bytes]], None]
"""Is told status and headers (lower-case names) of a successful answer before its first byte."""

_VALUE = re.compile(rb"[\x20-\x7e]{1,256}")
_SHOWN = {b"x-request-id": b"x-upstream-request-id", b"openai-processing-ms": b"x-upstream-processing-ms"}
_RATE_LIMIT = b"x-ratelimit-"


@dataclass(frozen=True, slots=True)
class ByteRequest:
    """One request whose body the gateway does not model.

    ``path`` follows ``base_url`` and may have a query. ``body`` is whole, or comes piece by piece; then ``length`` is
    its size, or None where nobody knows it yet (it is sent in chunks).
    """

    method: str
    path: str
    body: bytes | AsyncGenerator[bytes, None] = b""
    content_type: str | None = None
    accept: str = "*/*"
    length: int | None = None


class ByteTarget(Protocol):
    """The part of an upstream that relays bytes."""

    @property
    def name(self) -> str:
        """Its configured name."""
        ...

    @property
    def is_lent(self) -> bool:
        """Whether the latest call was made with a key that its caller lent."""
        ...

    def relay(
        self, request: ByteRequest, *, request_id: str | None = None, on_head: OnHead | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer of a relayed request as it comes."""
        ...


def shown_headers(headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """Return the upstream's ids and limits under names that cannot be taken for the gateway's own."""
    shown = [(_SHOWN[name], headers[name]) for name in _SHOWN.keys() & headers.keys()]
    if _RATE_LIMIT in b"\n".join(headers):
        limits = [name for name in headers if name.startswith(_RATE_LIMIT)]
        shown += [(b"x-upstream-" + name.removeprefix(b"x-"), headers[name]) for name in limits]
    return tuple([field for field in shown if _VALUE.fullmatch(field[1])])
