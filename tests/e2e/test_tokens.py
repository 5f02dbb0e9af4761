"""Tokens of an identity provider at a running gateway: official clients, every surface, throttle, new keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from mcp import Client
from mcp.client.auth.utils import (
    build_protected_resource_metadata_discovery_urls,
    extract_resource_metadata_from_www_auth,
)
from mcp.client.streamable_http import streamable_http_client

from tests.support.house import ADMIN, CHAT, drop, furnish
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.tokens import AUDIENCE, ISSUER, KeyServer, ec_key, jwk_of, key_server, rsa_key, token
from tests.support.waiting import wait_for

pytestmark = pytest.mark.anyio

RSA, EC = rsa_key(), ec_key()
METADATA = "/.well-known/oauth-protected-resource"

JWT = """
jwt:
  - name: corp
    issuer: {issuer}
    audience: {audience}
    algorithms: [RS256, ES256]
    jwks_url: {url}
    ca_file: {ca_file}
    scopes: [chat]
    claims: {{scopes: scope, allow_agents: agents, limits: tier}}
    scope_names: {{gateway.admin: admin}}
limit_profiles:
  trial: {{limits: {{requests_per_minute: 1}}}}
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyServer]:
    with key_server(tmp_path_factory.mktemp("keys")) as server:
        server.keys = [jwk_of(RSA, "k1")]
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream, keys: KeyServer) -> Iterator[Gateway]:
    """A gateway that accepts tokens beside its keys."""
    home = tmp_path_factory.mktemp("tokens")
    with running_gateway(
        furnished(home, upstream, keys), key=ADMIN, env={"GATEWAY_KEY_FAILURES_PER_MINUTE": "1000"}
    ) as started:
        wait_for(lambda: started.get("/usage", key=token(RSA)).status == 200, what="the keys are fetched")
        yield started


def furnished(home: Path, upstream: ObedientUpstream, keys: KeyServer) -> Path:
    furnish(home, upstream.url)
    security = home / "security.yaml"
    more = JWT.format(issuer=ISSUER, audience=AUDIENCE, url=keys.url, ca_file=keys.ca_file)
    security.write_text(security.read_text() + more)
    for name in ("WeatherAgent", "labs/Research"):
        drop(name, home / "agents")
    return home


def test_the_official_client_chats_with_a_token_and_reaches_what_it_grants(gateway: Gateway) -> None:
    given = token(RSA, agents=["default/*"])
    asked: Any = [{"role": "user", "content": "say fine weather"}]
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=given, max_retries=0) as client:
        answer = client.chat.completions.create(model="default/weatheragent", messages=asked)
        assert answer.choices[0].message.content == "fine weather"
        assert [model.id for model in client.models.list()] == ["default/weatheragent"]
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model="labs/research", messages=asked)
    gateway.logged("http.request", key_id="corp:alice")
    assert given not in gateway.log_text() and given.rpartition(".")[2] not in gateway.log_text()


def test_every_surface_asks_the_same_door(gateway: Gateway) -> None:
    plain, boss = token(RSA), token(RSA, sub="boss", scope="openid gateway.admin")
    for path in ("/agents", "/upstreams", "/metrics"):
        assert gateway.get(path, key=plain).status == 403
        assert gateway.get(path, key=boss).status == 200
    assert gateway.get("/v1/models", key=plain).json()["data"] == []
    assert gateway.get("/tools", key=plain).status == 200
    assert gateway.get("/v1/models", key=CHAT).status == 200, "keys work as before"
    assert gateway.get("/v1/models", key=token(EC, "ES256")).status == 401
    gateway.logged("token.rejected", issuer="corp", where=lambda line: "kid" in line["reason"])


def test_limits_by_a_profile_are_the_subjects_own(gateway: Gateway) -> None:
    def status(subject: str) -> int:
        body = {"model": "default/weatheragent", "messages": [{"role": "user", "content": "say x"}]}
        given = token(RSA, sub=subject, tier="trial", agents=["*"])
        return gateway.post("/v1/chat/completions", body, key=given).status

    assert [status("carol"), status("carol"), status("dave")] == [200, 429, 200]
    assert gateway.get("/usage", key=token(RSA, tier="platinum")).status == 401


def test_mcp_clients_are_told_where_to_get_a_token(gateway: Gateway) -> None:
    refused = httpx2.post(f"{gateway.url}/mcp", json={}, headers={"authorization": "Bearer a.b.c"})
    assert refused.status_code == 401 and 'error="invalid_token"' in refused.headers["www-authenticate"]
    for path in ("/mcp", "/mcp/"):
        answer = httpx2.post(f"{gateway.url}{path}", json={})
        found = extract_resource_metadata_from_www_auth(answer)
        assert answer.status_code == 401 and found == f"{gateway.url}{METADATA}/mcp"
    assert found in build_protected_resource_metadata_discovery_urls(None, f"{gateway.url}/mcp")
    document = httpx2.get(found).json()
    assert document["resource"] == f"{gateway.url}/mcp" and document["authorization_servers"] == [ISSUER]
    assert httpx2.get(f"{gateway.url}{METADATA}").json()["resource"] == gateway.url
    assert httpx2.get(f"{gateway.url}{METADATA}/other").status_code == 401, "the route is exact"
    assert httpx2.get(f"{gateway.url}/v1/models").headers["www-authenticate"] == "Bearer"


async def test_the_official_mcp_client_comes_with_a_token(gateway: Gateway) -> None:
    headers = {"authorization": f"Bearer {token(RSA, agents=['labs/*'])}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(f"{gateway.url}/mcp", http_client=http), cache=None) as made,
    ):
        assert [tool.name for tool in (await made.list_tools()).tools] == ["labs__research"]


def test_a_host_that_lies_is_not_repeated(gateway: Gateway) -> None:
    answer = httpx2.get(f"{gateway.url}{METADATA}", headers={"host": 'x"y'})
    assert 'x"y' not in answer.text


def test_new_keys_arrive_without_a_restart(gateway: Gateway, keys: KeyServer) -> None:
    fresh = rsa_key()
    given = token(fresh, kid="k7")
    assert gateway.get("/usage", key=given).status == 401
    keys.keys.append(jwk_of(fresh, "k7"))
    assert gateway.post("/security/refresh", {}).status == 200
    wait_for(lambda: gateway.get("/usage", key=given).status == 200, what="the new key is known")


def test_the_throttle_counts_tokens_and_keeps_good_ones(
    tmp_path: Path, upstream: ObedientUpstream, keys: KeyServer
) -> None:
    home = furnished(tmp_path, upstream, keys)
    with running_gateway(home, key=ADMIN, env={"GATEWAY_KEY_FAILURES_PER_MINUTE": "5"}) as gateway:
        good = token(RSA)
        wait_for(lambda: gateway.get("/usage", key=good).status == 200, what="the keys are fetched")
        old = token(RSA, exp=int(time.time()) - 3_600)
        assert [gateway.get("/usage", key=old).status for _ in range(7)] == [401] * 5 + [429] * 2
        assert gateway.get("/usage", key=good).status == 200
        assert gateway.get("/usage", key=token(RSA, sub="somebody-new")).status == 429


def test_without_issuers_there_is_no_document(tmp_path: Path, upstream: ObedientUpstream) -> None:
    furnish(tmp_path, upstream.url)
    with running_gateway(tmp_path, key=ADMIN) as gateway:
        assert httpx2.get(f"{gateway.url}{METADATA}").status_code == 404
        assert httpx2.post(f"{gateway.url}/mcp", json={}).headers["www-authenticate"] == "Bearer"
        assert gateway.get("/usage", key=token(RSA)).status == 401


def test_an_issuer_that_cannot_be_reached_costs_nobody_else_anything(
    tmp_path: Path, upstream: ObedientUpstream, keys: KeyServer
) -> None:
    home = furnished(tmp_path, upstream, keys)
    security = home / "security.yaml"
    security.write_text(security.read_text().replace(keys.url, "https://127.0.0.1:9/jwks"))
    with running_gateway(home, key=ADMIN) as gateway:
        answer = gateway.get("/usage", key=token(RSA))
        assert answer.status == 503 and "corp" in answer.json()["error"]["message"]
        assert gateway.get("/usage").status == 200
        gateway.logged("token.keys.failed")
