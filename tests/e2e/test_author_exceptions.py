"""What an exception in an author's code is to the caller: one 502, whatever was raised where; the gateway goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, drop, furnish, write_agent
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

PLACES = {
    "instructions": "say never",
    "input guardrail": "say never",
    "input guardrail in a thread": "say never",
    "output guardrail": "say never",
    "hook at the start": "say never",
    "hook after the model": "say never",
    "hook before a tool": "call work ;; say never",
    "hook at the end": "say never",
    "is_enabled": "say never",
    "needs_approval": "call work ;; say never",
    "tool input guardrail": "call work ;; say never",
    "async tool": "call work ;; say never",
    "tool in a thread": "call work_in_thread ;; say never",
    "task of a tool": "call work_in_a_task ;; say never",
    "failure_error_function": "call work_badly ;; say never",
    "tool output guardrail": "call work ;; say never",
    "tool_use_behavior": "call work ;; say never",
    "on_handoff": "call transfer_to_other ;; say never",
    "input_filter": "call transfer_to_other ;; say never",
}
"""Where author code stands in a run, and the conversation that gets there."""

KINDS: dict[str, str | None] = {
    "ValueError": "ValueError",
    "KeyError": "KeyError",
    "PermissionError": "PermissionError",
    "FileExistsError": "FileExistsError",
    "NotImplementedError": "NotImplementedError",
    "ConnectionError": "ConnectionError",
    "TimeoutError": "TimeoutError",
    "StopIteration": "StopIteration",
    "StopAsyncIteration": "StopAsyncIteration",
    "RecursionError": "RecursionError",
    "MemoryError": "MemoryError",
    "ExceptionGroup": "ValueError",
    "OwnException": "OwnException",
    "WithoutText": None,  # whoever asks for its text first fails in its place
    "CancelledError": "CancelledError",
    "OwnBaseException": "OwnBaseException",
    "SystemExit": "SystemExit",
    "KeyboardInterrupt": "KeyboardInterrupt",
}
"""What is raised, and what the log names as its cause."""

WHATEVER = [
    (kind, place, streamed)
    for kind in KINDS
    for place in ("async tool", "tool in a thread", "instructions")
    for streamed in (False, True)
]
LATE = 'class Late(AgentHooks):\n    async def on_end(self, *_):\n        raise KeyError("canary-" + "detail")\n'


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    """A gateway with an agent that raises, and one that raises when its answer has been sent."""
    home = tmp_path_factory.mktemp("raising")
    furnish(home, upstream.url)
    drop("Raising", home / "agents")
    late = write_agent(home / "agents", "Late", "You are late.", extra=f"from agents import AgentHooks\n\n{LATE}")
    late.write_text(late.read_text(encoding="utf-8").replace("tools=[]", "hooks=Late()"), encoding="utf-8")
    with running_gateway(home, key=ADMIN) as server:
        yield server


def ask(house: Gateway, kind: str, place: str, *, streamed: bool, **options: Any) -> Response:
    body = {
        "model": "default/raising",
        "stream": streamed,
        "metadata": {"at": place, "raise": kind},
        "messages": [{"role": "user", "content": PLACES.get(place, place)}],
    }
    return house.post("/v1/chat/completions", body, key=CHAT, timeout_s=10, **options)


def id_of(case: tuple[str, str, bool]) -> str:
    return "-".join(("raised", *map(str, case))).replace(" ", "_")


def assert_refused(answer: Response, case: tuple[object, ...]) -> None:
    assert answer.status == 502, (case, answer.status, answer.body)
    assert_error(answer.json())
    assert answer.error == {
        "message": "The agent 'default/raising' failed: its own code raised an error. Its author finds the details in "
        "the gateway's log under this request's id.",
        "type": "server_error",
        "param": None,
        "code": "agent_error",
    }, case
    assert answer.headers["x-should-retry"] == "false", case


@pytest.mark.parametrize("kind", ["ValueError", "CancelledError", "SystemExit"])
def test_wherever_it_is_raised(house: Gateway, kind: str) -> None:
    for place in PLACES:
        for streamed in (False, True):
            assert_refused(ask(house, kind, place, streamed=streamed), (place, streamed))


def test_whatever_is_raised(house: Gateway) -> None:
    for case in WHATEVER:
        kind, place, streamed = case
        assert_refused(ask(house, kind, place, streamed=streamed, headers={"x-request-id": id_of(case)}), case)

    def logged() -> dict[str, dict[str, Any]]:
        lines = [line for line in house.log_lines() if str(line["request_id"]).startswith("raised-")]
        return {line["request_id"]: line for line in lines if str(line["event"]).endswith(".failure")}

    wait_for(lambda: len(logged()) == len(WHATEVER), what="all are logged")
    failures = logged()
    for case in WHATEVER:
        failure = failures[id_of(case)]
        assert failure["error_code"] == "agent_error", case
        assert KINDS[case[0]] in (failure["error_type"], None), case


def test_a_tool_of_the_usual_kind_tells_the_model_and_the_answer_comes(house: Gateway) -> None:
    for kind in KINDS:
        if kind in ("OwnBaseException", "SystemExit", "KeyboardInterrupt"):
            continue  # no `except Exception` of the SDK's takes these: the run ends
        answer = ask(house, kind, "soft tool", streamed=False)
        assert answer.status == 200, (kind, answer.body)


def test_after_the_first_token_the_error_ends_the_stream(house: Gateway) -> None:
    question = {"model": "default/late", "messages": [{"role": "user", "content": "say too late"}]}
    before = errors_counted(house)
    streamed = house.post("/v1/chat/completions", {**question, "stream": True}, key=CHAT)
    assert streamed.status == 200
    events = [line for line in streamed.body.decode().split("\n\n") if line]
    assert '"code":"agent_error"' in events[-1] and "[DONE]" not in streamed.body.decode()
    assert "too" in streamed.body.decode()
    assert house.post("/v1/chat/completions", question, key=CHAT).error["code"] == "agent_error"
    assert errors_counted(house) == before + 2, "an error in a stream counts like any other"


def errors_counted(house: Gateway) -> float:
    text = house.get("/metrics/prometheus").body.decode()
    start = 'agent_gateway_errors_total{code="agent_error",domain="own"} '
    return next((float(line.removeprefix(start)) for line in text.splitlines() if line.startswith(start)), 0.0)


def test_nothing_of_it_leaves_the_process(house: Gateway) -> None:
    ask(house, "ExceptionGroup", "async tool", streamed=True)
    for path in ("/agents/errors", "/agents", "/metrics", "/metrics/prometheus"):
        assert "canary-detail" not in house.get(path).body.decode(), path
    assert "canary-detail" not in house.log_text(), "texts of exceptions may quote prompts and secrets"
