"""The SDK's names for agents are the same, found with less work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from agents import Agent
from agents import _run_state_agent_identity as identities

from sdk_adapter.identities import quick_identities


def ids_of(agent: Agent) -> dict[int, str]:
    return identities._build_agent_identity_keys_by_id(agent)


def alone() -> Agent:
    return Agent(name="a", instructions="x")


def with_handoffs() -> Agent:
    return Agent(name="a", handoffs=[Agent(name="b", handoffs=[Agent(name="c")]), Agent(name="d")])


def with_twins() -> Agent:
    return Agent(name="a", handoffs=[Agent(name="b", instructions="2"), Agent(name="b", instructions="1")])


@pytest.mark.parametrize("make", [alone, with_handoffs, with_twins])
def test_the_names_are_those_of_the_sdk(make: Callable[[], Agent]) -> None:
    agent = make()
    before = ids_of(agent)
    with quick_identities():
        assert ids_of(agent) == before


def test_agents_are_compared_only_where_names_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    signature = identities._agent_identity_signature

    def counted(agent: Agent) -> str:
        compared.append(agent.name)
        return signature(agent)

    monkeypatch.setattr(identities, "_agent_identity_signature", counted)
    ids_of(alone())
    assert compared, "the SDK no longer compares agents needlessly: quick_identities can go"
    compared.clear()
    with quick_identities():
        ids_of(with_handoffs())
        assert not compared
        ids_of(with_twins())
        assert compared


def test_it_is_undone() -> None:
    before = identities._build_agent_identity_map
    with quick_identities():
        assert identities._build_agent_identity_map is not before
    assert identities._build_agent_identity_map is before
