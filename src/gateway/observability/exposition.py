"""The text exposition of metric families, written in slices: a scrape never holds up the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from gateway.observability.families import Family

TEXT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = b"application/openmetrics-text; version=1.0.0; charset=utf-8"

_SLICE_S = 0.000_5


async def expose(families: Iterable[Family[Any]], *, openmetrics: bool = False) -> AsyncIterator[bytes]:
    """Yield the exposition piece by piece; each took about half a millisecond, and the loop turns after it.

    Every child is written at one moment, so a histogram agrees with itself; two children may be a slice apart.
    """
    lines: list[str] = []
    until = time.perf_counter() + _SLICE_S
    for family in families:
        lines.append(family.head(openmetrics=openmetrics))
        for text in family.texts():
            lines.append(text)
            if time.perf_counter() >= until:
                yield "".join(lines).encode()
                lines.clear()
                await asyncio.sleep(0)
                until = time.perf_counter() + _SLICE_S
    if openmetrics:
        lines.append("# EOF\n")
    yield "".join(lines).encode()
