"""One upstream and one gateway for all end-to-end tests of a session, and gateways of their own for those who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support.house import ADMIN, CHAT, drop, furnish, write_agent
from tests.support.obedient_upstream import ObedientUpstream, obedient_upstream
from tests.support.server import Gateway, running_gateway

SHARED = (
    "WeatherAgent",
    "Handoff",
    "InputGuardrail",
    "OutputGuardrail",
    "Hooks",
    "Structured",
    "AgentAsTool",
    "AsyncFactory",
    "SyncFactory",
    "TwoExports",
    "Several",
    "InnerRun",
    "ContextReader",
    "Approval",
    "HostedTool",
    "FixedModel",
    "ToolTrouble",
    "AirlineDesk",
    "RootAgentStyle",
    "email",
    "labs/Research",
    "single.py",
)

GatewayFactory = Callable[..., Gateway]


@pytest.fixture(scope="session")
def upstream() -> Iterator[ObedientUpstream]:
    """The upstream behind every gateway of the session."""
    with obedient_upstream() as server:
        yield server


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    """A gateway with every canonical agent and keys of every kind; its files never change."""
    home = tmp_path_factory.mktemp("gateway")
    furnish(home, upstream.url)
    for name in SHARED:
        drop(name, home / "agents")
    for name, settings in {
        "Hasty": {"upstream": "hasty"},
        "Gone": {"upstream": "gone"},
        "Refusing": {"client_tools": "refuse"},
        "Ignoring": {"client_tools": "ignore"},
    }.items():
        write_agent(home / "agents", name, f"You are {name.lower()}.", extra=f"__gateway__ = {settings!r}\n")
    # No pings: one that came before an early failure would turn its status into an event of a stream.
    env = {"GATEWAY_STREAM_PING_S": "60", "GATEWAY_REQUEST_BODY_LIMIT_BYTES": "1000000"}
    with running_gateway(home, env=env, key=ADMIN) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, upstream: ObedientUpstream) -> Iterator[GatewayFactory]:
    """Start gateways of the test's own. ``prepare`` is given the home folder before the start."""
    with ExitStack() as stack:

        def start_one(
            *,
            prepare: Callable[[Path], object] = lambda home: None,
            env: Mapping[str, str] | None = None,
            home: Path = tmp_path / "home",
            hide_foreign_models: bool = False,
            security: bool = True,
            **options: Any,
        ) -> Gateway:
            furnish(home, upstream.url, hide_foreign_models=hide_foreign_models, security=security)
            prepare(home)
            return stack.enter_context(
                running_gateway(home, env={"GATEWAY_AGENT_AUTO_RELOAD": "1"} | dict(env or {}), key=ADMIN, **options)
            )

        yield start_one


@pytest.fixture
def openai_client() -> Iterator[Callable[..., OpenAI]]:
    """Make official clients that are closed when the test ends."""
    with ExitStack() as stack:

        def make(gateway: Gateway, *, key: str = CHAT, prefix: str = "/v1", **options: Any) -> OpenAI:
            options.setdefault("max_retries", 0)
            options.setdefault("timeout", 60)
            return stack.enter_context(OpenAI(base_url=gateway.url + prefix, api_key=key, **options))

        yield make


@pytest.fixture
def client(gateway: Gateway, openai_client: Callable[..., OpenAI]) -> OpenAI:
    """The official client with an ordinary key, at the shared gateway."""
    return openai_client(gateway)
