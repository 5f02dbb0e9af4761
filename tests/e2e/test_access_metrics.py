"""Who came, and what they were let do: as numbers."""

from __future__ import annotations

from tests.e2e.conftest import GatewayFactory
from tests.support.house import CHAT, EXPIRED, NARROW, drop


def test_callers_and_decisions_on_them_are_counted(start: GatewayFactory) -> None:
    gateway = start(prepare=lambda home: drop("WeatherAgent", home / "agents"), hide_foreign_models=True)
    body = {"model": "default/weatheragent", "messages": [{"role": "user", "content": "Hello"}]}
    foreign = {**body, "model": "local/test-model"}
    before = {name: gateway.counted(f"agent_gateway_{name}") for name in ("auth_events", "access_decisions")}

    def grown(name: str) -> dict[str, float]:
        now = gateway.counted(f"agent_gateway_{name}")
        return {labels: value - before[name].get(labels, 0) for labels, value in now.items()}

    statuses = [gateway.post("/v1/chat/completions", body, key=key).status for key in (CHAT, "sk-wrong", EXPIRED, "")]
    assert statuses == [200, 401, 401, 401]
    # A model that a key may not know of is a denial, too, although its caller reads 404.
    assert gateway.post("/v1/chat/completions", foreign, key=NARROW).status == 404
    assert gateway.get("/agents", key=CHAT).status == 403
    assert gateway.post("/v1/chat/completions", body, headers={"x-gateway-upstream": "local"}, key=NARROW).status == 403

    events = grown("auth_events")
    assert events['method="key",outcome="refused"'] == 2
    assert events['method="none",outcome="missing"'] == 1
    assert events['method="key",outcome="accepted"'] >= 4
    decisions = grown("access_decisions")
    assert decisions['decision="allow",kind="model"'] == 1
    assert decisions['decision="deny",kind="model"'] == 1
    assert decisions['decision="deny",kind="scope"'] == 1
    assert decisions['decision="deny",kind="upstream"'] == 1


def test_an_address_that_guesses_is_counted_as_throttled(start: GatewayFactory) -> None:
    gateway = start(env={"GATEWAY_KEY_FAILURES_PER_MINUTE": "2"})
    assert gateway.get("/agents").status == 200  # a key that was good from there goes on
    assert [gateway.get("/v1/models", key=f"sk-guess-{n}").status for n in range(4)] == [401, 401, 429, 429]
    events = gateway.counted("agent_gateway_auth_events")
    assert (events['method="key",outcome="refused"'], events['method="key",outcome="throttled"']) == (2, 2)
