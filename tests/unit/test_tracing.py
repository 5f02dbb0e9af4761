"""Traces stay in the house, and cost nothing when nobody wants them."""

from __future__ import annotations

from typing import Any

from agents import Agent, RunConfig, Runner, add_trace_processor, set_trace_processors, set_tracing_disabled
from agents.tracing import TracingProcessor, setup

from sdk_adapter.tracing import HomeTraceProvider, nobody_listens, tracing_at_home
from tests.unit.sdk_fakes import World, run_async


class Listener(TracingProcessor):
    def __init__(self) -> None:
        self.traces: list[Any] = []
        self.spans: list[Any] = []

    def on_trace_start(self, trace: Any) -> None:
        self.traces.append(trace.export())

    def on_trace_end(self, trace: Any) -> None:
        pass

    def on_span_start(self, span: Any) -> None:
        pass

    def on_span_end(self, span: Any) -> None:
        self.spans.append(span.export())

    def shutdown(self) -> None:
        pass

    def force_flush(self) -> None:
        pass


def test_no_exporter_is_there_while_the_gateway_is_up() -> None:
    with tracing_at_home():
        assert isinstance(setup.GLOBAL_TRACE_PROVIDER, HomeTraceProvider)
        assert nobody_listens()
        set_tracing_disabled(True)
        assert nobody_listens()


def test_an_authors_processor_gets_traces_without_inputs() -> None:
    listener = Listener()
    world = World("canary-answer")
    with world.installed():
        add_trace_processor(listener)
        assert not nobody_listens()
        run_async(world.ask(Agent(name="a", instructions="canary"), messages="canary", session_id="s1"))
        set_trace_processors([])
        assert nobody_listens()
    assert listener.traces[0]["workflow_name"] == "default/test"
    assert listener.traces[0]["group_id"] == "s1"
    assert listener.traces[0]["metadata"]["request_id"] == "req-1"
    assert "canary" not in str(listener.traces) + str(listener.spans)


def test_runs_are_not_traced_when_nobody_listens() -> None:
    """Contract: the SDK asks the configured provider for nothing when tracing is off for a run."""
    world = World("a", "b")
    with world.installed():
        provider = setup.GLOBAL_TRACE_PROVIDER
        assert isinstance(provider, HomeTraceProvider)
        run_async(world.ask(Agent(name="a")))
        run_async(Runner.run(Agent(name="a"), "q", run_config=RunConfig()))
        assert not provider.listening
