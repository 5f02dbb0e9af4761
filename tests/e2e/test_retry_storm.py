"""Upstreams that die under load: retries, fail-over and hedges together multiply traffic by 1.2 at most."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from gateway.upstreams.transport import STALE_S
from tests.support.house import ADMIN, furnish
from tests.support.schema import assert_error
from tests.support.scripted_answers import Answer, status
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import Request, ScriptedUpstream
from tests.support.server import Gateway, running_gateway

CALLS = 200
NAMES = ("one", "two", "three")
HASTY = ("hasty-one", "hasty-two", "hasty-three")
"""The same upstreams, given up soon: for those that hang. Others are slow only where the machine is busy."""
RULES = """\
retry:
  connect: {attempts: 5, backoff_s: 0.01}
  server_error: {attempts: 5, backoff_s: 0.01}
  timeout: {attempts: 5, backoff_s: 0.01}
  incomplete: {attempts: 5, backoff_s: 0.01}
breaker: {failures: 5, open_s: 30}
health_interval_s: 3600
"""
DEATHS = {
    "closes": fault("refuse_after_accept"),
    "resets": fault("reset_at_once"),
    "says 500": status(500),
    "is slow to say 500": Answer(status=500, body={"error": {"message": "x"}}, first_delay_s=0.15),
    "hangs": fault("hang_before_headers"),
}


class Storm:
    def __init__(self, gateway: Gateway, upstreams: list[ScriptedUpstream]) -> None:
        self.gateway, self.upstreams = gateway, upstreams

    def ask(self, model: str, *, streamed: bool = False) -> Any:
        body = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": "Hello"}]}
        return self.gateway.post("/v1/chat/completions", body, timeout_s=60)

    def blow(self, model: str, *, at_once: int, streamed: bool = False) -> list[Any]:
        for upstream in self.upstreams:
            upstream.requests.clear()
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda _: self.ask(model, streamed=streamed), range(CALLS)))

    def counted(self) -> list[int]:
        """How many requests each upstream was sent, without those that a kept connection lost.

        An upstream may close a connection that has rested, and what was sent on it is sent again: no retry.
        """
        return [sum(not is_lost(request) for request in upstream.requests) for upstream in self.upstreams]


def is_lost(request: Request) -> bool:
    return request.rested_s >= STALE_S and request.cut and not request.sent_bytes


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    """A gateway over three upstreams; every test has models of its own, so that it finds breakers closed."""
    home = tmp_path_factory.mktemp("storm")
    with ExitStack() as stack:
        upstreams = [stack.enter_context(ScriptedUpstream()) for _ in NAMES]
        furnish(home, upstreams[0].base_url)
        rows = "".join(
            f'  - {{name: {name}, base_url: "{upstream.base_url}", timeouts: {{first_byte_s: {seconds}}}}}\n'
            for names, seconds in ((NAMES, 50), (HASTY, 2))
            for name, upstream in zip(names, upstreams, strict=True)
        )
        (home / "upstreams.yaml").write_text("version: 1\nupstreams:\n" + rows, encoding="utf-8")
        models = [f"{key.replace(' ', '-')}{n}" for key in (*DEATHS, "flaps", "well", "warm") for n in range(6)]
        text = "version: 1\nmodels:\n"
        for model in models:
            names = HASTY if model.startswith("hangs") else NAMES
            targets = ", ".join(f"{{model: {name}/{model}}}" for name in names)
            text += f"  plain-{model}: {{targets: [{targets}]}}\n"
            hedged = ", ".join(f"{{model: {name}/{model}-h}}" for name in names)
            text += f"  hedged-{model}: {{targets: [{hedged}], hedge: {{after_s: 0.02}}}}\n"
        (home / "routing.yaml").write_text(text + RULES, encoding="utf-8")
        yield Storm(stack.enter_context(running_gateway(home, key=ADMIN)), upstreams)


def script(storm: Storm, model: str, answer: Answer, *, names: tuple[str, ...] = NAMES) -> None:
    for name, upstream in zip(NAMES, storm.upstreams, strict=True):
        if name in names:
            upstream.script(model, answer)
            upstream.script(f"{model}-h", answer)


@pytest.mark.parametrize("how", ["plain", "hedged"])
@pytest.mark.parametrize("death", DEATHS)
def test_all_targets_die_at_once(storm: Storm, death: str, how: str) -> None:
    model = f"{death.replace(' ', '-')}0"
    script(storm, model, DEATHS[death])
    answers = storm.blow(f"{how}-{model}", at_once=CALLS)
    assert {answer.status for answer in answers} <= {502, 503, 504}
    assert_error(answers[0].json())
    assert sum(storm.counted()) <= CALLS * 1.2, storm.counted()


@pytest.mark.parametrize("how", ["plain", "hedged"])
def test_all_targets_die_after_they_were_well(storm: Storm, how: str) -> None:
    model = "warm0" if how == "plain" else "warm1"
    script(storm, model, Answer(text="well"))
    assert {answer.status for answer in storm.blow(f"{how}-{model}", at_once=20)} == {200}
    script(storm, model, status(500))
    assert {answer.status for answer in storm.blow(f"{how}-{model}", at_once=CALLS)} <= {502, 503}
    assert sum(storm.counted()) <= CALLS * 1.2, storm.counted()


@pytest.mark.parametrize("how", ["plain", "hedged"])
@pytest.mark.parametrize("at_once", [1, 20, CALLS])
@pytest.mark.parametrize("streamed", [False, True])
def test_all_targets_flap(storm: Storm, how: str, at_once: int, streamed: bool) -> None:
    model = f"flaps{(1, 20, CALLS).index(at_once) + 3 * streamed}"
    for upstream in storm.upstreams:
        upstream.clear()
        upstream.enqueue(*[status(500), Answer(text="well"), fault("refuse_after_accept"), Answer(text="well")] * 200)
    answers = storm.blow(f"{how}-{model}", at_once=at_once, streamed=streamed)
    for upstream in storm.upstreams:
        upstream.clear()
    assert 200 in {answer.status for answer in answers}
    # Calls that another target took over, and answered, are no storm: each further target has a window of five, and
    # each such answer widens it by one, which may fail.
    answered = sum(answer.status == 200 and answer.headers["x-gateway-upstream"] != "one" for answer in answers)
    assert sum(storm.counted()) <= CALLS * 1.2 + 10 + 2 * answered, (storm.counted(), answered)


@pytest.mark.parametrize("how", ["plain", "hedged"])
@pytest.mark.parametrize("at_once", [20, CALLS])
def test_a_target_that_is_well_takes_everything_over(storm: Storm, how: str, at_once: int) -> None:
    model = f"well{(20, CALLS).index(at_once)}"
    script(storm, model, status(500), names=("one", "three"))
    script(storm, model, Answer(text="well", first_delay_s=0.03), names=("two",))
    answers = storm.blow(f"{how}-{model}", at_once=at_once)
    assert {answer.status for answer in answers} == {200}
    assert {answer.headers["x-gateway-upstream"] for answer in answers} == {"two"}
    # `one` answers each of these calls at most once; its breaker spares it the rest.
    assert storm.counted()[0] <= CALLS * 1.2
