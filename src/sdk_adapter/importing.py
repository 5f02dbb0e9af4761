"""Marks the time in which a drop-in's file is imported, and what ends the import early: a run started by the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_importing: ContextVar[bool] = ContextVar("importing", default=False)


class RunAtImport(BaseException):
    """A file that is imported for its agents began to run one; no `Exception`, so that no script takes it for its own.

    The SDK's own examples end so (``result = Runner.run_sync(agent, "…")``). What stands above that line is served.
    """


@contextmanager
def importing() -> Iterator[None]:
    """Refuse runs in this context until the block ends."""
    token = _importing.set(True)
    try:
        yield
    finally:
        _importing.reset(token)


def refuse_run_at_import() -> None:
    """Raise `RunAtImport` while a file is being imported."""
    if _importing.get():
        raise RunAtImport


def stopped_line(stop: RunAtImport, path: str) -> int:
    """Return the line of a module's own code at which its import ended."""
    trace = stop.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            return trace.tb_lineno
        trace = trace.tb_next
    return 1
