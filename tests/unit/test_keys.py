"""Who is let in, as whom, and with which words the others are turned away."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.config import Settings
from gateway.errors import ConfigError, Unauthenticated
from gateway.principal import Allowance, Limits, Principal
from gateway.security.acl import AccessList
from gateway.security.keys import DEV_KEY, Caller, Keyring

KEY = "sk-gw-0123456789abcdef"
HASHED = hashlib.sha256(KEY.encode()).hexdigest()
SHIPPED = Path(__file__).parents[2] / "src" / "config" / "security.yaml"


def keyring(tmp_path: Path, text: str = "", **settings: str) -> Keyring:
    path = tmp_path / "security.yaml"
    path.write_text(text, encoding="utf-8")
    env = {f"GATEWAY_{name.upper()}": value for name, value in settings.items()}
    return Keyring.load(Settings.from_env({"GATEWAY_SECURITY_CONFIG": str(path), **env}))


def one_key(extra: str = "") -> str:
    return f"api_keys:\n  - id: alice\n    hashed_key: {HASHED}\n{extra}"


def bearer(key: str, **fields: object) -> Caller:
    return Caller(authorization=f"Bearer {key}", peer="203.0.113.7", **fields)  # type: ignore[arg-type]


def refusal(ring: Keyring, caller: Caller) -> str:
    with pytest.raises(Unauthenticated) as caught:
        ring.authenticate(caller)
    assert (caught.value.status, caught.value.code, caught.value.type) == (
        401,
        "invalid_api_key",
        "invalid_request_error",
    )
    return caught.value.message


def test_the_same_key_counts_in_either_header_and_any_spelling_of_bearer(tmp_path: Path) -> None:
    ring = keyring(tmp_path, one_key())
    alice = Principal(id="alice", key_id="alice", allow=("*",))
    for caller in (
        bearer(KEY),
        Caller(authorization=f"bEaReR   {KEY} "),
        Caller(x_api_key=KEY),
        Caller(authorization=f"Bearer {KEY}", x_api_key=KEY),
    ):
        assert ring.authenticate(caller) == alice


def test_headers_that_disagree_are_refused_even_when_one_is_right(tmp_path: Path) -> None:
    message = refusal(keyring(tmp_path, one_key()), Caller(authorization=f"Bearer {KEY}", x_api_key="other"))
    assert message.startswith("The Authorization and x-api-key headers hold different keys.")


def test_another_scheme_is_explained(tmp_path: Path) -> None:
    message = refusal(keyring(tmp_path, one_key()), Caller(authorization="Basic YTpi", x_api_key=KEY))
    assert message.startswith("The Authorization header is not of the form 'Bearer YOUR_KEY'.")


@pytest.mark.parametrize("caller", [Caller(), Caller(authorization=""), Caller(authorization="Bearer ")])
def test_no_key_has_openais_words(tmp_path: Path, caller: Caller) -> None:
    assert refusal(keyring(tmp_path, one_key()), caller).startswith("You didn't provide an API key.")


def test_a_wrong_key_has_openais_words_and_is_logged_by_digest_prefix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "sk-ab-this-is-not-a-key"
    message = refusal(keyring(tmp_path, one_key()), bearer(wrong))
    assert message.startswith("Incorrect API key provided: sk-ab***.")
    record = next(r for r in caplog.records if r.__dict__.get("event") == "api_key.rejected")
    digest = hashlib.sha256(wrong.encode()).hexdigest()
    assert record.__dict__["fields"] == {"digest_prefix": digest[:12], "client_ip": "203.0.113.7"}


@pytest.mark.parametrize("key", ["short", "sch\xc3\xbc-long-enough-key", "\x1b[31mred-red-red-red"])
def test_a_short_or_odd_wrong_key_is_not_shown_at_all(tmp_path: Path, key: str) -> None:
    assert refusal(keyring(tmp_path, one_key()), bearer(key)).startswith("Incorrect API key provided: ***.")


def test_a_key_of_other_characters_is_found_by_its_bytes(tmp_path: Path) -> None:
    key = "schlüssel-für-alle"
    ring = keyring(tmp_path, f"api_keys: [{{id: alice, hashed_key: {hashlib.sha256(key.encode()).hexdigest()}}}]")
    assert ring.authenticate(bearer(key.encode().decode("latin-1"))).id == "alice"


def test_everything_a_key_may_say(tmp_path: Path) -> None:
    text = one_key(
        "    description: for Alice\n    allow_agents: [default/*, team/one]\n    scopes: [chat, metrics]\n"
        "    profile: openwebui\n    namespace: team\n    expires_at: 2999-12-31\n"
    )
    assert keyring(tmp_path, text).authenticate(bearer(KEY)) == Principal(
        id="alice",
        key_id="alice",
        allow=("default/*", "team/one"),
        scopes=frozenset({"chat", "metrics"}),
        namespace="team",
        profile="openwebui",
    )


def test_a_key_in_clear_works_and_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = keyring(tmp_path, f"api_keys: [{{id: alice, key: {KEY}}}]")
    assert ring.authenticate(bearer(KEY)).id == "alice"
    assert "security.yaml holds the key 'alice' in clear" in caplog.text
    assert KEY not in caplog.text
    assert KEY not in repr(ring)


@pytest.mark.parametrize("moment", ["2020-01-01", "2020-01-01T00:00:00Z", "'2020-01-01'", "2020-01-01 00:00:00"])
def test_an_expired_key_is_told_so(tmp_path: Path, moment: str) -> None:
    ring = keyring(tmp_path, one_key(f"    expires_at: {moment}\n"))
    assert refusal(ring, bearer(KEY)) == ("The API key 'alice' has expired. Ask the gateway's operator for a new one.")


def test_a_key_that_expires_today_works_today(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    today = datetime.now(UTC).date().isoformat()
    assert keyring(tmp_path, one_key(f"    expires_at: {today}\n")).authenticate(bearer(KEY)).id == "alice"
    assert any(r.__dict__.get("event") == "api_key.expiring" for r in caplog.records)


@pytest.mark.parametrize(("days", "warned"), [(6, True), (8, False)])
def test_a_key_is_announced_seven_days_before_it_expires(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: int, warned: bool
) -> None:
    moment = (datetime.now(UTC) + timedelta(days=days)).isoformat()
    keyring(tmp_path, one_key(f"    expires_at: '{moment}'\n"))
    assert [r.levelno for r in caplog.records if r.__dict__.get("event") == "api_key.expiring"] == (
        [logging.WARNING] if warned else []
    )


def test_the_environments_key_is_an_admin_beside_those_of_the_file(tmp_path: Path) -> None:
    ring = keyring(tmp_path, one_key(), api_key="from-the-environment")
    assert ring.authenticate(bearer("from-the-environment")).is_admin
    assert not ring.authenticate(bearer(KEY)).is_admin


def test_the_metrics_token_reads_metrics_and_reaches_no_model(tmp_path: Path) -> None:
    principal = keyring(tmp_path, one_key(), metrics_token="scrape-me").authenticate(bearer("scrape-me"))
    assert principal.scopes == {"metrics"}
    assert not AccessList().allows(principal, "default/weather")


LOCAL = {"peer": "127.0.0.1", "host": "localhost:8000"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"peer": "::1", "host": "[::1]:8000"},
        {"peer": "::ffff:127.0.0.1", "host": "127.0.0.1"},
        {"host": "LOCALHOST"},
        {"origin": "http://localhost:3000"},
        {"fetch_site": "same-origin"},
        {"fetch_site": "none"},
    ],
)
def test_without_any_key_configured_a_local_caller_needs_none(tmp_path: Path, fields: dict[str, str]) -> None:
    principal = keyring(tmp_path).authenticate(Caller(**{**LOCAL, **fields}))  # type: ignore[arg-type]
    assert (principal.id, principal.is_admin) == ("development", True)


@pytest.mark.parametrize(
    "fields",
    [
        {"peer": "192.168.1.5"},
        {"peer": None},
        {"peer": "not-an-address"},
        {"host": None},
        {"host": "gateway.example"},
        {"host": "localhost.evil.example"},
        {"host": "localhost:8000@evil.example"},
        {"host": "127.0.0.1.nip.io"},
        {"forwarded": True},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"fetch_site": "cross-site"},
        {"fetch_site": "same-site"},
    ],
)
def test_a_keyless_caller_that_may_be_somebody_else_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    message = refusal(keyring(tmp_path), Caller(**{**LOCAL, **fields}))  # type: ignore[arg-type]
    assert message.startswith("You didn't provide an API key.")
    assert message.endswith("may call without one.")


def test_keyless_callers_are_announced_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keyring(tmp_path)
    assert [r.__dict__["event"] for r in caplog.records] == ["security.keyless.enabled"]
    assert "gateway keys create NAME --yaml" in caplog.text


def test_one_configured_key_ends_keyless_calls_and_the_dev_key(tmp_path: Path) -> None:
    ring = keyring(tmp_path, one_key())
    refusal(ring, Caller(peer="127.0.0.1", host="localhost"))
    refusal(ring, Caller(peer="127.0.0.1", host="localhost", x_api_key=DEV_KEY))


def test_keyless_is_no_licence_for_wrong_keys(tmp_path: Path) -> None:
    refusal(keyring(tmp_path), Caller(peer="127.0.0.1", host="localhost", x_api_key="made-up"))


@pytest.mark.parametrize("shipped", [True, False])
def test_the_dev_key_is_an_admin_on_this_machine_in_development(tmp_path: Path, shipped: bool) -> None:
    ring = keyring(tmp_path, SHIPPED.read_text(encoding="utf-8") if shipped else "")
    principal = ring.authenticate(Caller(x_api_key=DEV_KEY, peer="127.0.0.1", host="localhost:8000"))
    assert (principal.id, principal.is_admin) == ("dev", True)
    for caller in (
        Caller(x_api_key=DEV_KEY, peer="192.168.1.5", host="localhost"),
        Caller(x_api_key=DEV_KEY, peer="127.0.0.1", host="localhost", forwarded=True),
        Caller(x_api_key=DEV_KEY, peer="127.0.0.1", host="rebound.example"),
    ):
        assert refusal(ring, caller).startswith("The development key is honoured only from the machine")


def test_the_shipped_file_still_asks_for_a_key(tmp_path: Path) -> None:
    ring = keyring(tmp_path, SHIPPED.read_text(encoding="utf-8"))
    refusal(ring, Caller(peer="127.0.0.1", host="localhost"))


@pytest.mark.parametrize("text", ["", SHIPPED.read_text(encoding="utf-8"), one_key("    expires_at: 2020-01-01\n")])
def test_production_without_a_usable_key_does_not_start(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keyring(tmp_path, text, env="production")
    assert "'gateway keys create NAME --yaml' makes one" in caught.value.message


def test_production_refuses_the_dev_key_beside_a_good_one(tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8") + f"  - {{id: alice, hashed_key: {HASHED}}}\n"
    ring = keyring(tmp_path, text, env="production")
    assert ring.authenticate(bearer(KEY)).id == "alice"
    refusal(ring, Caller(x_api_key=DEV_KEY, peer="127.0.0.1", host="localhost"))
    refusal(ring, Caller(peer="127.0.0.1", host="localhost"))


def test_a_key_without_a_list_inherits_the_defaults(tmp_path: Path) -> None:
    text = f"""
default:
  allow_agents: [default/*]
  namespace_defaults:
    labs: {{allow_agents: [public-*, labs/one]}}
api_keys:
  - {{id: heir, hashed_key: {HASHED}}}
  - {{id: own, key: other, allow_agents: [team/*]}}
  - {{id: none, key: third, allow_agents: []}}
"""
    ring = keyring(tmp_path, text)
    heir = ring.authenticate(bearer(KEY))
    assert heir.allow == ("default/*",)
    assert heir.allow_by_namespace == ("labs/public-*", "labs/one")
    assert ring.authenticate(bearer("other")).allow_by_namespace == ()
    assert ring.authenticate(bearer("other")).allow == ("team/*",)
    assert ring.authenticate(bearer("third")).allow == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("api_keys: [{id: a}]", "the key 'a' needs exactly one of 'hashed_key' (sha256 in hex) and 'key'"),
        ("api_keys: [{id: a, key: x, hashed_key: y}]", "the key 'a' needs exactly one"),
        ("api_keys: [{id: a, hashed_key: abc}]", "hashed_key of 'a' is not a sha256 in hex (64 digits)"),
        ("api_keys: [{id: a, key: '${KEY}'}]", "'key' of 'a' is empty or a placeholder"),
        ("api_keys: [{id: 'a b', key: x}]", "the key id 'a b' is not accepted"),
        ("api_keys: [{id: a, key: x}, {id: a, key: y}]", "two api_keys have the id 'a'"),
        ("api_keys: [{id: a, key: x}, {id: b, key: x}]", "The keys 'a' and 'b' are the same key"),
        ("api_keys: [{id: a, key: x, expires_at: soon}]", "expires_at of the key 'a' is 'soon'; write 2030-12-31"),
        ("api_keys: [{id: a, key: x, allow_agents: ['défaut/*']}]", "the pattern 'défaut/*' in allow_agents can match"),
        ("api_keys: [{id: a, key: x, scope: admin}]", "unknown key 'scope'; did you mean 'scopes'?"),
        ("api_keys: [{id: a, key: x, scopes: [root]}]", "security.yaml:1: api_keys[0].scopes[0]"),
        (
            "default: {namespace_defaults: {labs: {allow_agents: ['team/*']}}}\napi_keys: [{id: a, key: x}]",
            "namespace_defaults.labs.allow_agents holds 'team/*', which reaches into another namespace",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_sentence_that_mends_it(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keyring(tmp_path, text)
    assert says in caught.value.message


def test_a_key_has_its_own_limits_or_the_defaults(tmp_path: Path) -> None:
    text = (
        "version: 1\ndefault:\n  limits: {requests_per_minute: 60}\n  end_user_limits: {tokens_per_minute: 9}\n"
        "  namespace_limits: {sales: {cost_per_day_usd: 2.5}}\napi_keys:\n"
        "  - {id: own, key: k-own, limits: {concurrent_runs: 2}, namespace: sales}\n"
        "  - {id: old, key: k-old, rate_limit: {per_minute: 5}}\n"
        "  - {id: none, key: k-none, limits: {}, end_user_limits: {}}\n"
        "  - {id: plain, key: k-plain}\n"
    )
    keys = keyring(tmp_path, text)

    def of(name: str) -> Allowance | None:
        return keys.authenticate(Caller(x_api_key=f"k-{name}")).allowance

    users = Limits(tokens_per_minute=9)
    assert of("own") == Allowance(key=Limits(concurrent_runs=2), namespace=Limits(cost_per_day_usd=2.5), end_user=users)
    assert of("old") == Allowance(key=Limits(requests_per_minute=5), end_user=users)
    assert of("none") is None
    assert of("plain") == Allowance(key=Limits(requests_per_minute=60), end_user=users)


def test_the_environment_limits_keys_of_which_nothing_else_is_said(tmp_path: Path) -> None:
    keys = keyring(tmp_path, one_key(), rate_limit_per_minute="7", api_key="sk-env-key-0123456789")
    env = keys.authenticate(Caller(x_api_key="sk-env-key-0123456789"))
    assert env.allowance == Allowance(key=Limits(requests_per_minute=7))


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ("limits: {requests_per_minute: 0}", "requests_per_minute"),
        ("limits: {cost_per_day_usd: -1}", "cost_per_day_usd"),
        ("limits: {requests_per_hour: 1}", "unknown key 'requests_per_hour'"),
        ("limits: {requests_per_minute: 1}\n    rate_limit: {per_minute: 2}", "leave one of them"),
    ],
)
def test_a_limit_that_is_none_is_refused(tmp_path: Path, limits: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        keyring(tmp_path, one_key(f"    {limits}\n"))
