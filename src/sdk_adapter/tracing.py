"""Tracing that stays in the house.

The SDK's default exports every run, inputs included, to OpenAI as soon as a key is in the environment. While the
gateway is up, traces go only to processors that an author has added; without any, runs are not traced at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agents.tracing import TracingProcessor, set_trace_provider, setup
from agents.tracing.provider import DefaultTraceProvider


class HomeTraceProvider(DefaultTraceProvider):
    """A trace provider without the exporter to OpenAI; ``listening`` says whether anybody wants traces."""

    def __init__(self) -> None:
        super().__init__()
        self.listening = False

    def register_processor(self, processor: TracingProcessor) -> None:
        """Add a processor (an author's ``add_trace_processor``)."""
        super().register_processor(processor)
        self.listening = True

    def set_processors(self, processors: list[TracingProcessor]) -> None:
        """Replace the processors (an author's ``set_trace_processors``)."""
        super().set_processors(processors)
        self.listening = bool(processors)


@contextmanager
def tracing_at_home() -> Iterator[None]:
    """Replace the process's trace provider; put the old one back at the end."""
    before = setup.GLOBAL_TRACE_PROVIDER
    set_trace_provider(HomeTraceProvider())
    try:
        yield
    finally:
        setup.GLOBAL_TRACE_PROVIDER = before


def nobody_listens() -> bool:
    """Return whether runs need not be traced."""
    provider = setup.GLOBAL_TRACE_PROVIDER
    return isinstance(provider, HomeTraceProvider) and not provider.listening
