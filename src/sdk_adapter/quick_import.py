"""Imports what needs the SDK, for two thirds of the price.

A third of `import agents` is work for objects that most processes never use: pydantic builds a validator for each of
some thousand types (three versions of the MCP protocol, saved run states), and the collector walks over all that has
been imported, again and again. Here a validator is built when it is first asked for, which is what pydantic's
``defer_build`` does, and the collector rests. What other threads define meanwhile is built at once, as ever.
"""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def quick_import(name: str) -> ModuleType:
    """Import a module and all it needs in this thread; what lives then is left out of later collections."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        # Deferred: pydantic is a part of what takes long.
        from pydantic import BaseModel, TypeAdapter  # noqa: PLC0415

        with _building_later(BaseModel, TypeAdapter):
            module = importlib.import_module(name)
        gc.freeze()  # the import leaves next to no garbage: looking for it would hold up the event loop for 80 ms
    finally:
        if was_collecting:
            gc.enable()
    return module


class _OnlyHere(dict[str, Any]):
    """The configuration of all models, deferring in one thread alone: a model takes a copy when it is made."""

    def __init__(self, usual: dict[str, Any], thread: int) -> None:
        super().__init__(usual, defer_build=True)
        self._usual, self._thread = usual, thread

    def copy(self) -> dict[str, Any]:
        return dict(self) if threading.get_ident() == self._thread else self._usual.copy()


@contextmanager
def _building_later(model: Any, adapter: Any) -> Iterator[None]:
    """Let this thread's models and type adapters be built at first use; undone at the end."""
    here = threading.get_ident()
    usual, defers = model.model_config, adapter._defer_build
    model.model_config = _OnlyHere(usual, here)
    adapter._defer_build = property(lambda self: threading.get_ident() == here or defers.fget(self))
    try:
        yield
    finally:
        model.model_config = usual
        adapter._defer_build = defers
