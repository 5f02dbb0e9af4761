"""What every test shares: asyncio under `@pytest.mark.anyio`, and an environment without the machine's keys."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """A developer's own GATEWAY_* and OPENAI_* variables decide nothing here, and none leaks to the next test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("GATEWAY_", "OPENAI_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)
