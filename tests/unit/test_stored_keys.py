"""Stored keys in the keyring: digests with and without a pepper, what a file takes precedence over, reminders, cuts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import Settings
from gateway.errors import ConfigError, Conflict, InvalidRequest, NotFound, StoreUnavailable, Unauthenticated
from gateway.principal import Limits, Principal
from gateway.security.config import ApiKey, SecurityConfig, SecurityDefaults
from gateway.security.keybook import KeyBook
from gateway.security.keys import DEV_KEY, Caller, ExpiryReminder, Keyring, digest
from gateway.security.stored import KeyOptions, StoredKey, check_pepper, read_options, stored_digest
from gateway.store.store import Store, database_url
from tests.support.databases import BACKENDS, database

MODULES = ("gateway.security.key_rows",)
SECRET = "sk-gw-stored-canary"
PEPPER = "a pepper of at least sixteen"
FILE = SecurityConfig(api_keys=[ApiKey(id="file", hashed_key=digest("sk-file"), scopes=("chat", "admin"))])


def key(**fields: object) -> StoredKey:
    given = {"id": "alice", "digest": stored_digest(SECRET.encode(), None), "created_at": 1.0, "created_by": "test"}
    return StoredKey(**(given | fields))  # type: ignore[arg-type]


def ring(*stored: StoredKey, settings: Settings | None = None, config: SecurityConfig = FILE) -> Keyring:
    return Keyring.build(config, settings or Settings(), None, stored, must_be_usable=False)


def shown(keyring: Keyring, secret: str = SECRET) -> Principal:
    caller = Caller(authorization=f"Bearer {secret}", host="localhost", peer="127.0.0.1")
    return keyring.authenticate(caller)


def test_a_stored_key_has_what_its_options_say_and_inherits_the_rest() -> None:
    defaults = SecurityDefaults(allow_agents=["default/*"], allow_tools=["clock"], limits=Limits(concurrent_runs=2))
    config = SecurityConfig(default=defaults)
    plain = shown(ring(key(), config=config))
    assert (plain.allow, plain.allow_tools, plain.scopes) == (("default/*",), ("clock",), frozenset({"chat"}))
    assert plain.allowance is not None and plain.allowance.key == Limits(concurrent_runs=2)
    options = KeyOptions(allow_agents=["a/*"], scopes=("chat", "admin"), namespace="team", limits=Limits())
    own = shown(ring(key(options=options), config=config))
    assert (own.allow, own.namespace, own.is_admin, own.allowance) == (("a/*",), "team", True, None)


def test_a_pepper_is_needed_to_honour_what_was_stored_with_it() -> None:
    peppered = key(digest=stored_digest(SECRET.encode(), PEPPER))
    assert shown(ring(peppered, settings=Settings(key_pepper=PEPPER))).key_id == "alice"
    assert shown(ring(key(), settings=Settings(key_pepper=PEPPER))).key_id == "alice", "made before there was one"
    for settings in (Settings(), Settings(key_pepper=PEPPER + "!")):
        with pytest.raises(Unauthenticated):
            shown(ring(peppered, settings=settings))
    with pytest.raises(Unauthenticated):  # the stored digest itself is no key
        shown(ring(peppered, settings=Settings(key_pepper=PEPPER)), peppered.digest)
    with pytest.raises(ConfigError, match="GATEWAY_KEY_PEPPER"):
        check_pepper(Settings(key_pepper="short"))


def test_revoked_expired_and_rotated_keys() -> None:
    now = time.time()
    newer = stored_digest(b"sk-newer", None)
    rotated = {"digest": newer, "previous_digest": stored_digest(SECRET.encode(), None)}
    assert shown(ring(key(**rotated, previous_until=now + 60))).key_id == "alice"
    assert shown(ring(key(**rotated, previous_until=now + 60)), "sk-newer").key_id == "alice"
    over = [
        key(revoked_at=now),
        key(expires_at=now - 1),
        key(**rotated, previous_until=now - 1),
        key(**rotated, previous_until=now + 60, revoked_at=now),
        key(**rotated, previous_until=now + 60, expires_at=now - 1),
    ]
    for stored in over:
        with pytest.raises(Unauthenticated):
            shown(ring(stored))


def test_the_file_wins_over_a_stored_key_of_the_same_id() -> None:
    keyring = ring(key(id="file"))
    with pytest.raises(Unauthenticated):
        shown(keyring)
    assert shown(keyring, "sk-file").is_admin


def test_while_the_store_is_unread_an_unknown_key_is_nobodys_fault() -> None:
    for settings in (Settings(), Settings(environment="production")):
        keyring = Keyring.build(FILE, settings, None, None)
        assert shown(keyring, "sk-file").key_id == "file"
        with pytest.raises(StoreUnavailable):
            shown(keyring)
    unread = Keyring.build(SecurityConfig(), Settings(), None, None)
    assert not unread.keyless
    with pytest.raises(StoreUnavailable):
        shown(unread, DEV_KEY)


def test_a_stored_key_ends_keyless_development_and_serves_production_alone() -> None:
    assert ring(config=SecurityConfig()).keyless
    made = ring(key(), config=SecurityConfig())
    assert not made.keyless
    with pytest.raises(Unauthenticated):
        shown(made, DEV_KEY)
    production = Settings(environment="production")
    assert shown(Keyring.build(SecurityConfig(), production, None, [key()])).key_id == "alice"
    with pytest.raises(ConfigError):
        Keyring.build(SecurityConfig(), production, None, [key(revoked_at=1.0)])


def test_who_is_honoured_still() -> None:
    keyring = ring(key())
    caller, drop_in = shown(keyring), Principal("drop-in", "drop-in", (), is_drop_in=True)
    assert keyring.honoured()(caller)
    for later in (ring(key(revoked_at=1.0)), ring(key(expires_at=1.0)), ring()):
        assert not later.honoured()(caller)
        assert later.honoured()(drop_in)
    nobody = Caller(host="localhost", peer="127.0.0.1")
    keyless = ring(config=SecurityConfig())
    assert keyless.honoured()(keyless.authenticate(nobody))
    assert not keyring.honoured()(keyless.authenticate(nobody))


def test_an_end_within_a_week_is_said_once_a_day(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "gateway.security")
    now = time.time()
    keyring = ring(key(expires_at=now + 3 * 86_400), key(id="bob", digest="sha256:b", expires_at=now + 8 * 86_400))
    reminder = ExpiryReminder(ring())

    def said() -> list[str]:
        caplog.clear()
        reminder.remind(keyring)
        return [getattr(record, "fields", {}).get("key_id", "") for record in caplog.records]

    assert said() == ["alice"]
    assert said() == []
    monkeypatch.setattr(time, "time", lambda: now + 86_401)
    assert said() == ["alice", "bob"]
    monkeypatch.setattr(time, "time", lambda: now + 4 * 86_400)
    assert said() == ["bob"], "what is over is not about to end"


@pytest.mark.parametrize(
    "fields",
    [{"scopes": ["root"]}, {"colour": 1}, {"allow_agents": [""]}, {"allow_agents": ["a b"]}, {"namespace": "../x"}],
)
def test_options_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        read_options(fields)


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield database_url(Settings(database_url=found))


def test_changes_at_once_by_two_books_are_all_kept_and_seen_by_both(url: str) -> None:
    async def work() -> None:
        async with Store(url, MODULES) as store, Store(url, MODULES) as other:
            books = KeyBook(store, None), KeyBook(other, PEPPER)
            seen = []
            books[1].on_change = lambda: seen.append(len(books[1].keys or ()))
            made = await books[0].create("alice", KeyOptions(), created_by="test")
            await asyncio.gather(
                *(books[n % 2].create(f"k{n}", KeyOptions(), created_by="test") for n in range(6)),
                books[0].rotate("alice", grace_s=60, by="test"),
                books[1].revoke("alice", by="test"),
                return_exceptions=True,
            )
            for book in books:
                await book.refresh()
                assert [key.id for key in book.keys or ()] == ["alice", *(f"k{n}" for n in range(6))]
            alice = (books[0].keys or ())[0]
            assert alice.revoked_at is not None, "no rotation brings a revoked key back"
            assert made.key.digest != made.secret
            assert seen[-1] == 7
            before = list(seen)
            await books[1].refresh()
            assert seen == before, "nothing changed"
            with pytest.raises(Conflict):
                await books[0].create("alice", KeyOptions(), created_by="test")
            with pytest.raises(NotFound):
                await books[0].rotate("alice", by="test")
            with pytest.raises(InvalidRequest):
                await books[0].rotate("k1", grace_s=-1, by="test")

    asyncio.run(work())


def test_a_gateway_that_has_no_database_yet_makes_none_by_looking(tmp_path: Path) -> None:
    async def work() -> None:
        async with Store(database_url(Settings(state_dir=tmp_path / "state")), MODULES) as store:
            book = KeyBook(store, None)
            await book.refresh()
            assert (book.keys, store.status) == ((), "idle")

    asyncio.run(work())
    assert not (tmp_path / "state").exists()
