"""CliError: a failure the command line says in one sentence."""

from __future__ import annotations


class CliError(Exception):
    """What went wrong and what to do, in one sentence; ``status`` is the exit code (2: called wrongly)."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
