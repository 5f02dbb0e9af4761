"""GET /v1/models and /v1/models/{id}, as their handlers answer from a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from api.models import get_model, list_models
from api.routing import Request, Response
from gateway.config import Settings
from gateway.errors import ModelNotAllowed, ModelNotFound
from gateway.events import RunEvent
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.registry.entry import AgentEntry, AgentOptions
from gateway.registry.registry import Registry
from gateway.routing.table import Router
from gateway.security.config import SecurityConfig, SecurityDefaults
from gateway.security.keys import Keyring
from gateway.snapshot import Snapshot, SnapshotHolder
from gateway.upstreams.config import load_upstreams
from gateway.upstreams.table import UpstreamTable, open_upstreams
from tests.support.schema import assert_model, assert_models

CHAT = Principal(id="chat", key_id="chat", allow=("*",))
ADMIN = Principal(id="root", key_id="root", allow=("*",), scopes=frozenset({"admin"}))


class Silent:
    def execute(self, run: Any) -> AsyncIterator[RunEvent]:
        raise AssertionError("listing models runs nothing")


def entry(id_: str, **fields: Any) -> AgentEntry:
    namespace, _, name = id_.partition("/")
    given: dict[str, Any] = {
        "display_name": name.title(),
        "kind": "sdk",
        "source": "file",
        "created": 1_700_000_000,
        "executor": Silent(),
        "description": "Talks about the weather.",
        "content_hash": "abc",
        "file": f"{name}/agent.py",
        **fields,
    }
    return AgentEntry(id=id_, namespace=namespace, name=name, **given)


async def demo_table() -> UpstreamTable:
    async with open_upstreams(load_upstreams(Settings())) as upstreams:
        return upstreams.table


def gateway(entries: Iterable[AgentEntry], *, hide: bool = False, loaded: bool = True) -> Any:
    config = SecurityConfig(default=SecurityDefaults(hide_foreign_models=hide))
    table = asyncio.run(demo_table())
    snapshot = Snapshot(
        version=1,
        registry=Registry.build(entries),
        upstreams=table,
        routes=Router(Metrics()).build(table),
        keyring=Keyring.build(config, Settings()),
    )
    event = asyncio.Event()
    if loaded:
        event.set()
    return SimpleNamespace(settings=Settings(), holder=SnapshotHolder(snapshot), loaded=event)


def request(gate: Any, principal: Principal, model: str = "") -> Request:
    unused = cast("Any", None)
    return Request({}, unused, unused, gate, "req", {}, principal=principal, path_params={"model": model})


def listed(gate: Any, principal: Principal) -> list[dict[str, Any]]:
    body = msgspec.json.decode(asyncio.run(list_models(request(gate, principal))).body)
    assert_models(body)
    found: list[dict[str, Any]] = body["data"]
    return found


def one(gate: Any, principal: Principal, model: str) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.json.decode(asyncio.run(get_model(request(gate, principal, model))).body)
    assert_model(body)
    return body


WEATHER = {
    "id": "default/weather",
    "object": "model",
    "created": 1_700_000_000,
    "owned_by": "agent-gateway",
    "name": "Weather",
    "description": "Talks about the weather.",
    "metadata": {"namespace": "default", "display_name": "Weather", "kind": "sdk"},
}


def test_a_model_is_what_the_official_schema_says_and_no_more_than_a_user_may_know() -> None:
    gate = gateway([entry("default/weather")])
    assert next(model for model in listed(gate, CHAT) if model["id"] == "default/weather") == WEATHER
    assert one(gate, CHAT, "default/weather") == WEATHER


def test_an_admin_sees_where_it_comes_from() -> None:
    gate = gateway([entry("default/weather", status="stale", generation=3)])
    metadata = one(gate, ADMIN, "default/weather")["metadata"]
    assert metadata == WEATHER["metadata"] | {  # type: ignore[operator]
        "status": "stale",
        "source_file": "weather/agent.py",
        "content_hash": "abc",
        "generation": 3,
    }


def test_the_list_holds_what_the_key_reaches_and_what_can_answer() -> None:
    gate = gateway(
        [
            entry("default/weather"),
            entry("team/secret"),
            entry("default/broken", executor=None, status="error"),
            entry("default/inner", options=AgentOptions(expose=False)),
        ]
    )
    narrow = Principal(id="n", key_id="n", allow=("default/*",))
    assert [model["id"] for model in listed(gate, narrow)] == ["default/weather"]
    everything = [model["id"] for model in listed(gate, CHAT)]
    assert everything[:2] == ["default/weather", "team/secret"]
    assert everything[2:]
    assert all(id_.startswith("demo/") for id_ in everything[2:])


def test_raw_upstream_models_are_described_too() -> None:
    gate = gateway([])
    raw = listed(gate, CHAT)[0]
    assert raw["metadata"]["kind"] == "upstream"
    assert raw["owned_by"] == "demo"
    assert one(gate, CHAT, raw["id"]) == raw


def test_names_that_mean_a_model_give_its_canonical_id() -> None:
    gate = gateway([entry("default/weather", aliases=("weather-agent",))])
    for name in ("default/weather", "DEFAULT/Weather", "weather", "weather-agent"):
        assert one(gate, CHAT, name)["id"] == "default/weather"


@pytest.mark.parametrize("name", ["nobody", "default/nobody", "default/weather/", "default/wéather", "x" * 10_000])
def test_an_unknown_model_is_404(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        one(gateway([entry("default/weather")]), CHAT, name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 400


def test_a_foreign_model_is_403_or_hidden() -> None:
    narrow = Principal(id="n", key_id="n", allow=("team/*",))
    with pytest.raises(ModelNotAllowed):
        one(gateway([entry("default/weather")]), narrow, "weather")
    with pytest.raises(ModelNotFound):
        one(gateway([entry("default/weather")], hide=True), narrow, "weather")


def test_an_agent_that_did_not_load_is_no_model() -> None:
    with pytest.raises(ModelNotFound, match="did not load"):
        one(gateway([entry("default/broken", executor=None, status="error")]), CHAT, "default/broken")


def test_a_body_is_made_once_for_each_access_list_and_snapshot() -> None:
    gate = gateway([entry("default/weather")])

    def body(principal: Principal) -> bytes:
        answer: Response = asyncio.run(list_models(request(gate, principal)))
        return answer.body

    first = body(CHAT)
    other_key_same_rights = Principal(id="other", key_id="other", allow=("*",))
    assert body(other_key_same_rights) is first
    assert body(ADMIN) != first
    gate.holder.swap(registry=Registry.build([entry("default/weather"), entry("default/second")]))
    assert b"default/second" in body(CHAT)


def test_while_agents_load_a_name_may_only_be_early() -> None:
    gate = gateway([], loaded=False)

    async def scenario() -> Response:
        async def arrive() -> None:
            gate.holder.swap(registry=Registry.build([entry("default/weather")]))

        gate.wait_for_agents = arrive
        return await get_model(request(gate, CHAT, "default/weather"))

    assert msgspec.json.decode(asyncio.run(scenario()).body) == WEATHER
