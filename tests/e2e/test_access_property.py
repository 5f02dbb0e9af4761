"""Random keys, spellings and ways to a model, through a running gateway, against the access rules written once more."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import NamedTuple

import pytest

from tests.support.house import ADMIN, furnish, write_agent
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.reference_acl import Grants, decide
from tests.support.server import Gateway, running_gateway

TRIALS = 2_000
SEED = 20_261_121

AGENTS = [f"{space}/{name}" for space in ("alpha", "beta") for name in ("ant", "bee", "cat")]
"""Three bare names, each of two agents."""
DESK, VAULT = "alpha/desk", "alpha/desk-vault"
RAW = ["local/test-model", "hasty/hasty-model"]
ALIAS = "gpt-5-mini"
PATTERNS = [
    "*",
    "alpha/*",
    "beta/*",
    "*/ant",
    "beta/bee",
    "alpha/[ab]*",
    "alpha/desk*",
    VAULT,
    "local/*",
    "hasty/h*",
    ALIAS,
]

DESK_CODE = """\
from agents import Agent

vault = Agent(name="Vault", instructions="You are the vault.")
desk = Agent(
    name="Desk",
    instructions="You are the desk.",
    handoffs=[vault],
    tools=[vault.as_tool(tool_name="vault_tool", tool_description="Ask the vault.")],
)
__agents__ = [desk, vault]
__gateway__ = {"namespace": "alpha"}
"""


class Trial(NamedTuple):
    """One request: whose key, which way, the model as it is spelled."""

    key: int
    way: str
    name: str


def grants() -> list[Grants]:
    """Return the keys' rights; the first has none, the second all, the third the desk alone."""
    chance = random.Random(SEED)
    drawn = [tuple(chance.sample(PATTERNS[1:], chance.randint(1, 3))) for _ in range(10)]
    return [Grants(f"key{number}", own, ()) for number, own in enumerate([(), ("*",), (DESK,), *drawn])]


def secret(key_id: str) -> str:
    return f"sk-test-property-{key_id}-aaaaaaaaaaaaaaaaaaaa"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("property")
    furnish(home, upstream.url)
    rows = [
        {
            "id": key.key_id,
            "hashed_key": hashlib.sha256(secret(key.key_id).encode()).hexdigest(),
            "allow_agents": key.own,
        }
        for key in grants()
    ]
    rows.append({"id": "admin", "hashed_key": hashlib.sha256(ADMIN.encode()).hexdigest(), "scopes": ["admin", "chat"]})
    (home / "security.yaml").write_text(json.dumps({"version": 1, "api_keys": rows}), encoding="utf-8")
    for agent in AGENTS:
        space, _, name = agent.partition("/")
        extra = f"__gateway__ = {{'namespace': {space!r}}}\n"
        write_agent(home / "agents", agent, f"You are {name}.", extra=extra)
    (home / "agents" / "Desk").mkdir()
    (home / "agents" / "Desk" / "agent.py").write_text(DESK_CODE, encoding="utf-8")
    with running_gateway(home, key=ADMIN) as server:
        assert server.model_ids() >= {*AGENTS, DESK, VAULT, *RAW}
        yield server


def reached(key: Grants, model: str) -> bool:
    return decide(key, model) != "deny"


def expected(key: Grants, trial: Trial) -> bool:
    """Return whether the caller gets there, by the reference alone."""
    name = trial.name
    if not name.isascii():
        return False
    lower = name.lower()
    if trial.way == "upstream header":
        return reached(key, name) and any(pattern in ("*", "local/*") for pattern in key.own)
    if trial.way in ("handoff", "agent tool"):
        return reached(key, DESK) and reached(key, VAULT)
    if trial.way == "mcp":
        return lower == name and name in {*AGENTS, DESK, VAULT} and reached(key, name)
    if lower in {*AGENTS, DESK, VAULT}:
        return reached(key, lower)
    if "/" not in name:
        sharing = [agent for agent in [*AGENTS, DESK, VAULT] if agent.partition("/")[2] == lower]
        if sharing:
            return sum(reached(key, agent) for agent in sharing) == 1
        if name in ("test-model", "hasty-model"):
            return reached(key, next(model for model in RAW if model.endswith(name)))
    return name in (*RAW, ALIAS) and reached(key, name)


def spelled(chance: random.Random, name: str) -> str:
    """Return a name as somebody might write it, right or wrong."""
    return chance.choice(
        [name] * 5
        + [name.upper(), name.title(), name.partition("/")[2] or name, name.partition("/")[2] or name]
        + [
            f"{name} ",
            f" {name}",
            name.replace("a", "а"),
            name.replace("/", "//"),
            f"./{name}",
            f"{name}\u0000",
            f"{name}x",
        ]
    )


def trials() -> list[Trial]:
    chance = random.Random(SEED + 1)
    made = []
    for _ in range(TRIALS):
        way = chance.choices(["chat", "get", "upstream header", "mcp", "handoff", "agent tool"], [40, 40, 8, 8, 2, 2])[
            0
        ]
        name = chance.choice([*AGENTS, *AGENTS, DESK, VAULT, *RAW, ALIAS])
        if way in ("handoff", "agent tool"):
            name = DESK
        elif way == "upstream header":
            name = chance.choice([RAW[0], ALIAS])
        elif way != "mcp":
            name = spelled(chance, name)
        made.append(Trial(chance.randrange(13), way, name))
    return made


class Caller:
    """Asks over one kept connection."""

    def __init__(self, connection: HTTPConnection, upstream: ObedientUpstream) -> None:
        self._connection, self._upstream = connection, upstream
        self._number = 0

    def got_there(self, key: Grants, trial: Trial) -> bool:
        """Ask, and return whether the model was reached; any refusal but 403 and 404 fails."""
        self._number += 1
        shown = {"authorization": f"Bearer {secret(key.key_id)}", "content-type": "application/json"}
        match trial.way:
            case "get":
                return self._ask("GET", f"/v1/models/{_quoted(trial.name)}", None, shown)[0] == 200
            case "mcp":
                return self._call_tool(trial.name, shown)
            case "handoff" | "agent tool":
                return self._pass_on(trial, shown)
            case "upstream header":
                shown["x-gateway-upstream"] = "local"
        return self._ask("POST", "/v1/chat/completions", _question(trial.name, "say hi"), shown)[0] == 200

    def _call_tool(self, name: str, shown: dict[str, str]) -> bool:
        shown |= {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
        params = {"name": name.replace("/", "__"), "arguments": {"input": "say hi"}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        body = self._ask("POST", "/mcp", message, shown)[1]
        return b'"text":"hi' in body

    def _pass_on(self, trial: Trial, shown: dict[str, str]) -> bool:
        mark = f"mark-{self._number}"
        call = "transfer_to_vault {}" if trial.way == "handoff" else f'vault_tool {{"input":"say {mark}"}}'
        self._ask("POST", "/v1/chat/completions", _question(trial.name, f"call {call} ;; say {mark}"), shown)
        return any("You are the vault." in found.system for found in self._upstream.find(mark))

    def _ask(self, method: str, path: str, body: object, shown: dict[str, str]) -> tuple[int, bytes]:
        self._connection.request(method, path, None if body is None else json.dumps(body), shown)
        answer = self._connection.getresponse()
        text = answer.read()
        assert answer.status in (200, 403, 404), (method, path, body, answer.status, text)
        return answer.status, text


def _question(model: str, text: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


def _quoted(name: str) -> str:
    return "".join(f"%{byte:02x}" if byte != 0x2F else "/" for byte in name.encode())


def test_every_way_to_a_model_agrees_with_the_reference(house: Gateway, upstream: ObedientUpstream) -> None:
    keys, outcomes = grants(), Counter[tuple[str, bool]]()
    with closing(HTTPConnection("127.0.0.1", house.port, timeout=60)) as connection:
        caller = Caller(connection, upstream)
        for trial in trials():
            key = keys[trial.key]
            wanted = expected(key, trial)
            assert caller.got_there(key, trial) is wanted, (key, trial)
            outcomes[trial.way, wanted] += 1
    assert len(outcomes) == 12, "each way was open to some and closed to others"
    assert min(outcomes.values()) >= 5, outcomes
