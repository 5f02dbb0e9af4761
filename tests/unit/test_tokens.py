"""Tokens of issuers (JWT): what lets a caller in, with which rights, and every trick that does not."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest

from gateway.config import Settings
from gateway.errors import ConfigError, ServiceUnavailable, Unauthenticated
from gateway.principal import Limits
from gateway.security import issuer_keys, tokens
from gateway.security.config import ApiKey, SecurityConfig, load_security
from gateway.security.issuer_keys import IssuerBook, IssuerKeys
from gateway.security.keys import Caller, Keyring
from gateway.security.tokens import TokenVerifier
from tests.support.mcp_servers import until
from tests.support.tokens import (
    AUDIENCE,
    ISSUER,
    by_hand,
    claims,
    ec_key,
    ed_key,
    jwk_of,
    key_server,
    pem_of,
    rsa_key,
    token,
)

RSA, OTHER, EC = rsa_key(), rsa_key(), ec_key()
ED = ed_key()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class House:
    """An issuer with two keys, in a folder, and the verifier of its tokens."""

    def __init__(self, folder: Path, **entry: Any) -> None:
        self.jwks = folder / "jwks.json"
        self.write(jwk_of(RSA, "k1"), jwk_of(EC, "k2"), jwk_of(ED, "k3"))
        made = {
            "name": "corp",
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "algorithms": ["RS256", "ES256", "EdDSA"],
            "jwks_file": str(self.jwks),
            "scopes": ["chat"],
        } | entry
        made = {name: value for name, value in made.items() if value is not None}
        self.settings = Settings(security_config=folder / "security.yaml")
        document = {"jwt": [made], "limit_profiles": {"gold": {"limits": {"requests_per_minute": 7}}}}
        (folder / "security.yaml").write_text(json.dumps(document))
        self.config: SecurityConfig = load_security(self.settings)
        self.keys = IssuerKeys(self.config.jwt[0], lambda: None)
        if self.keys.entry.jwks_url is None:
            self.keys.read()
        self.verifier = TokenVerifier(self.config, [self.keys])
        self.keyring = Keyring.build(self.config, self.settings, tokens=self.verifier)

    def write(self, *keys: dict[str, Any]) -> None:
        self.jwks.write_text(json.dumps({"keys": list(keys)}))

    def who(self, given: str) -> Any:
        return self.keyring.authenticate(Caller(authorization=f"Bearer {given}", peer="192.0.2.7"))

    def refused(self, given: str) -> str:
        with pytest.raises(Unauthenticated) as caught:
            self.who(given)
        assert given not in caught.value.message
        return caught.value.message


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(RSA, "RS256", "k1"), (EC, "ES256", "k2"), (ED, "EdDSA", "k3")])
def test_a_token_lets_its_subject_in_with_nothing_but_what_is_granted(
    house: House, key: Any, algorithm: str, kid: str
) -> None:
    caller = house.who(token(key, algorithm, kid=kid, scope="admin", allow_agents=["*"], namespace="root"))
    assert (caller.key_id, caller.issuer, caller.namespace) == ("corp:alice", "corp", "default")
    assert caller.scopes == {"chat"} and caller.allow == () == caller.allow_tools and caller.allowance is None


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: by_hand({"alg": "none"}, claims()), "alg"),
        (lambda: by_hand({"alg": "None", "kid": "k1"}, claims()), "alg"),
        (lambda: by_hand({"alg": "", "kid": "k1"}, claims()), "alg"),
        (lambda: _signed_with_the_public_key(), "alg"),
        (lambda: token(RSA, "RS512"), "alg"),
        (lambda: token(OTHER), "signature"),
        (lambda: token(RSA)[:-8] + "AAAAAAAA", "signature"),
        (lambda: _changed(token(RSA), sub="mallory"), "signature"),
        (lambda: token(EC, "ES256", kid="k1"), "kid"),
        (lambda: token(RSA, kid="k9"), "kid"),
        (lambda: token(RSA, kid="../../etc/passwd"), "kid"),
        (lambda: by_hand({"alg": "RS256", "kid": ["k1"]}, claims(), b"x"), "malformed"),
        (lambda: by_hand({"alg": "RS256", "kid": {"k": 1}}, claims(), b"x"), "malformed"),
        (lambda: token(RSA, headers={"crit": ["exp"]}), "malformed"),
        (lambda: token(OTHER, kid="k1", headers={"jwk": jwk_of(OTHER, "k1")}), "signature"),
        (lambda: token(OTHER, kid="k1", headers={"jku": "https://evil.example/jwks"}), "signature"),
        (lambda: token(RSA, exp=int(time.time()) - 60), "expired"),
        (lambda: token(RSA, exp=None), "lacks"),
        (lambda: token(RSA, exp="tomorrow"), "malformed"),
        (lambda: token(RSA, exp=float("inf")), "malformed"),
        (lambda: token(RSA, nbf=int(time.time()) + 600), "not valid yet"),
        (lambda: token(RSA, iat=int(time.time()) + 600), "not valid yet"),
        (lambda: token(RSA, aud="somebody-else"), "aud"),
        (lambda: token(RSA, aud=None), "lacks"),
        (lambda: token(RSA, aud=["x", "agent-gateway-2"]), "aud"),
        (lambda: token(RSA, iss="https://evil.example/"), "issuer"),
        (lambda: token(RSA, iss=ISSUER.rstrip("/")), "issuer"),
        (lambda: token(RSA, sub=None), "names nobody"),
        (lambda: token(RSA, sub=""), "names nobody"),
        (lambda: token(RSA, filler="x" * 9_000), "longer"),
        (lambda: "..", "malformed"),
        (lambda: "a.b.c", "malformed"),
        (lambda: by_hand({"alg": "RS256"}, claims()) + ".x.y", "Incorrect API key"),
        (lambda: "é.é.é", "malformed"),
    ],
)
def test_what_is_wrong_with_a_token_is_401_and_says_so(house: House, made: Any, words: str) -> None:
    assert words in house.refused(made())


def _signed_with_the_public_key() -> str:
    """The classic: a public key, which everybody has, as the secret of an HMAC."""
    unsigned = by_hand({"alg": "HS256", "kid": "k1"}, claims()).rpartition(".")[0]
    signature = hmac.digest(pem_of(RSA), unsigned.encode(), "sha256")
    return f"{unsigned}.{jwt.utils.base64url_encode(signature).decode()}"


def _changed(signed: str, **more: Any) -> str:
    head, _, signature = signed.split(".")
    said = jwt.utils.base64url_encode(json.dumps(claims(**more)).encode()).decode()
    return f"{head}.{said}.{signature}"


def test_deep_json_and_odd_encodings_are_malformed(house: House) -> None:
    head = jwt.utils.base64url_encode(b'{"alg":"RS256","kid":"k1"}').decode()
    deep = jwt.utils.base64url_encode((b"[" * 2_500) + (b"]" * 2_500)).decode()
    assert "malformed" in house.refused(f"{head}.{deep}.AAAA")
    assert "malformed" in house.refused(f"{head}.!!!!.AAAA")
    nested = jwt.utils.base64url_encode(
        b'{"iss":"https://login.example.com/","x":' + b"[" * 2_000 + b"]" * 2_000 + b"}"
    )
    assert "malformed" in house.refused(f"{head}.{nested.decode()}.AAAA")


def test_claims_grant_what_the_operator_reads_from_them(tmp_path: Path) -> None:
    house = House(
        tmp_path,
        claims={
            "subject": "client_id",
            "scopes": "realm.roles",
            "allow_agents": "https://example.com/agents",
            "allow_tools": "tools",
            "namespace": "team",
            "limits": "tier",
        },
        scope_names={"gateway.admin": "admin"},
        allow_agents=["default/*"],
    )
    given = {
        "client_id": "robot 7",
        "realm": {"roles": ["gateway.admin", "other"]},
        "https://example.com/agents": ["labs/*"],
        "tools": "search fetch_*",
        "team": "labs",
        "tier": "gold",
    }
    caller = house.who(token(RSA, **given))
    assert caller.key_id == f"corp:#{hashlib.sha256(b'robot 7').hexdigest()[:32]}"
    assert caller.scopes == {"chat", "admin"} and caller.namespace == "labs"
    assert (caller.allow, caller.allow_tools) == (("default/*", "labs/*"), ("search", "fetch_*"))
    assert caller.allowance.key == Limits(requests_per_minute=7)
    again = house.who(token(RSA, **given | {"client_id": "robot-8"}))
    assert again.key_id == "corp:robot-8" and again.allowance is caller.allowance
    for wrong in (
        {"realm": {"roles": 7}},
        {"tools": [1]},
        {"tools": ["a b"]},
        {"team": "no namespace"},
        {"team": 3},
        {"tier": "platinum"},
        {"client_id": 7},
    ):
        assert "its claim" in house.refused(token(RSA, **given | wrong))
    plain = house.who(token(RSA, client_id="nobody"))
    assert plain.scopes == {"chat"} and plain.allow == ("default/*",) and plain.allow_tools == ()


def test_a_token_is_verified_once_until_it_expires(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    given = token(RSA)
    first = house.who(given)
    monkeypatch.setattr(tokens._jwt, "decode", lambda *_, **__: pytest.fail("verified again"))
    assert house.who(given) is first
    moment = time.time() + 631
    assert house.keyring.honoured()(first)
    monkeypatch.setattr(time, "time", lambda: moment)
    assert not house.keyring.honoured()(first)

    def expired(*_: Any, **__: Any) -> None:
        raise jwt.ExpiredSignatureError

    monkeypatch.setattr(tokens._jwt, "decode", expired)
    assert "expired" in house.refused(given)


def test_what_is_remembered_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_REMEMBERED", 3)
    for number in range(6):
        house.who(token(EC, "ES256", kid="k2", sub=f"s{number}"))
    assert len(house.verifier._known) == 3


def test_keys_that_go_take_the_tokens_they_signed_along(house: House) -> None:
    given = token(RSA)
    caller = house.who(given)
    assert house.keyring.honoured()(caller)
    house.write(jwk_of(OTHER, "k1"))
    house.keys.read()
    assert "signature" in house.refused(given)
    assert house.who(token(OTHER)).key_id == "corp:alice"


def test_an_issuer_that_is_gone_ends_its_callers(house: House) -> None:
    caller = house.who(token(RSA))
    without = Keyring.build(SecurityConfig(), house.settings)
    assert house.keyring.honoured()(caller) and not without.honoured()(caller)


def test_keys_and_tokens_live_side_by_side(tmp_path: Path) -> None:
    house = House(tmp_path)
    key = "key.with.dots"
    config = msgspec.structs.replace(house.config, api_keys=[ApiKey(id="k", key=key)])
    keyring = Keyring.build(config, house.settings, tokens=house.verifier)
    assert keyring.authenticate(Caller(x_api_key=key)).key_id == "k"
    assert keyring.authenticate(Caller(x_api_key=token(RSA))).key_id == "corp:alice"


def test_with_issuers_nobody_is_let_in_without_a_credential(house: House) -> None:
    assert not house.keyring.keyless
    with pytest.raises(Unauthenticated):
        house.keyring.authenticate(Caller(peer="127.0.0.1", host="localhost"))
    production = Settings(environment="production")
    assert Keyring.build(house.config, production, tokens=house.verifier).tokens is house.verifier


def test_a_token_without_kid_needs_an_issuer_with_one_key(tmp_path: Path) -> None:
    house = House(tmp_path)
    assert house.who(token(RSA, kid=None)).key_id == "corp:alice"
    house.write(jwk_of(RSA, "k1"), jwk_of(OTHER, "k2"))
    house.keys.read()
    assert "kid" in house.refused(token(RSA, kid=None, sub="bob"))


def test_a_public_key_file_verifies_whatever_kid_says(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem_of(EC))
    house = House(tmp_path, jwks_file=None, public_key_file=str(tmp_path / "key.pem"), algorithms=["ES256"])
    assert house.who(token(EC, "ES256", kid="anything")).key_id == "corp:alice"
    assert house.who(token(EC, "ES256", kid=None)).key_id == "corp:alice"
    for content in (b"", b"no key", pem_of(rsa_key(1024)), pem_of(RSA)):
        (tmp_path / "key.pem").write_bytes(content)
        with pytest.raises(ConfigError, match="corp"):
            house.keys.read()
    assert house.who(token(EC, "ES256", sub="bob")).key_id == "corp:bob", "what was known is kept"


@pytest.mark.parametrize(
    "keys",
    [
        [{"kty": "oct", "k": "c2VjcmV0", "kid": "k1", "alg": "HS256"}],
        [jwk_of(RSA, "k1", use="enc")],
        [jwk_of(RSA, "k1", alg="RS512")],
        [jwk_of(RSA, "k1") | {"key_ops": ["encrypt"]}],
        [jwk_of(rsa_key(1024), "k1")],
        [{"kty": "RSA", "kid": "k1"}],
        [{"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"}],
        ["text", 7, None],
        [],
        [jwk_of(RSA, "k1")] * 101,
    ],
)
def test_keys_that_must_not_verify_are_left_out(house: House, keys: list[Any]) -> None:
    house.jwks.write_text(json.dumps({"keys": keys}))
    with pytest.raises(ConfigError, match="corp"):
        house.keys.read()


@pytest.mark.parametrize("text", ["", "[]", '{"keys": 7}', "{}", "\xff", '{"keys":[' + "[" * 90_000])
def test_a_broken_key_set_is_refused_by_name(house: House, text: str) -> None:
    house.jwks.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="corp"):
        house.keys.read()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"jwks_url": "https://x.example/"}, "exactly one"),
        ({"jwks_file": None}, "exactly one"),
        ({"jwks_file": None, "jwks_url": "http://x.example/"}, "https"),
        ({"jwks_file": None, "jwks_url": "https://user:pw@x.example/"}, "https"),
        ({"algorithms": ["HS256"]}, "HS256"),
        ({"algorithms": ["none"]}, "none"),
        ({"algorithms": []}, "algorithms"),
        ({"audience": []}, "audience"),
        ({"audience": ""}, "audience"),
        ({"scopes": []}, "could do nothing"),
        ({"claims": {"scopes": "scope"}}, "scope_names"),
        ({"scope_names": {"x": "admin"}}, "scope_names"),
        ({"scope_names": {"x": "root"}, "claims": {"scopes": "s"}}, "root"),
        ({"limits": "platinum"}, "limit_profiles"),
        ({"namespace": "a b"}, "namespace"),
        ({"allow_agents": ["é"]}, "pattern"),
        ({"name": "a:b"}, "name"),
        ({"leeway_s": 3_600}, "leeway_s"),
        ({"claim": {}}, "did you mean"),
    ],
)
def test_an_issuer_that_cannot_be_used_is_refused(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        House(tmp_path, **entry)


def test_two_entries_of_one_issuer_are_refused(tmp_path: Path) -> None:
    house = House(tmp_path)
    document = json.loads((tmp_path / "security.yaml").read_text())
    document["jwt"].append(document["jwt"][0] | {"name": "other"})
    (tmp_path / "security.yaml").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="two entries have the issuer"):
        load_security(house.settings)


@pytest.mark.anyio
async def test_keys_with_an_address_are_fetched_in_the_background_and_asked_again_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with key_server(tmp_path) as server:
        server.keys = [jwk_of(RSA, "k1")]
        house = House(tmp_path, jwks_file=None, jwks_url=server.url, ca_file=str(server.ca_file))
        book = IssuerBook()
        (keys,) = await book.follow(house.config.jwt)
        verifier = TokenVerifier(house.config, [keys])

        def who(given: str) -> Any:
            return verifier.authenticate(given, hashlib.sha256(given.encode()).hexdigest(), None)

        with pytest.raises(ServiceUnavailable):
            who(token(RSA))
        running = asyncio.create_task(book.run())
        try:
            await until(lambda: keys.are_known, "the keys were fetched")
            assert who(token(RSA)).key_id == "corp:alice" and server.asked == 1
            server.keys.append(jwk_of(EC, "k2"))
            for _ in range(50):
                with pytest.raises(Unauthenticated, match="kid"):
                    who(token(EC, "ES256", kid="k2"))
                await asyncio.sleep(0)
            assert server.asked == 1, "within a minute of the last look nobody asks again"
            assert 50 < keys.due - time.monotonic() <= 60
            keys._tried -= issuer_keys.WANTED_S
            with pytest.raises(Unauthenticated, match="kid"):
                who(token(EC, "ES256", kid="k2"))
            await until(lambda: keys.version == 2, "the keys were fetched again")
            assert who(token(EC, "ES256", kid="k2")).key_id == "corp:alice" and server.asked == 2
            server.status = 302
            await keys.refresh()
            assert server.asked == 3 and keys.version == 2, "a redirect is not followed, and what is known is kept"
            assert 0 < keys.due - time.monotonic() <= 5
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running


@pytest.mark.anyio
async def test_an_unknown_authority_is_not_believed(tmp_path: Path) -> None:
    with key_server(tmp_path) as server:
        server.keys = [jwk_of(RSA, "k1")]
        house = House(tmp_path, jwks_file=None, jwks_url=server.url)
        await house.keys.refresh()
        assert not house.keys.are_known and server.asked == 0
