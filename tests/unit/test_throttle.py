"""An address that guesses keys is turned away; whoever was good before, and everybody else, is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gateway.config import Settings
from gateway.errors import TooManyFailures, Unauthenticated
from gateway.security.keys import Caller, Keyring
from gateway.security.throttle import WINDOW_S, FailureThrottle

KEYS = {name: f"sk-gw-{name}-0123456789" for name in ("alice", "bob")}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    rows = "".join(
        f"  - {{id: {name}, hashed_key: {hashlib.sha256(key.encode()).hexdigest()}}}\n" for name, key in KEYS.items()
    )
    (tmp_path / "security.yaml").write_text(f"api_keys:\n{rows}")
    return Keyring.load(Settings.from_env({"GATEWAY_SECURITY_CONFIG": str(tmp_path / "security.yaml")}))


def caller(key: str | None, peer: str = "203.0.113.7") -> Caller:
    return Caller(authorization=f"Bearer {key}" if key else None, peer=peer)


def fail(throttle: FailureThrottle, keyring: Keyring, times: int, peer: str = "203.0.113.7") -> None:
    for number in range(times):
        with pytest.raises(Unauthenticated):
            throttle.authenticate(keyring, caller(f"sk-guess-{number}", peer))


def test_after_the_limit_a_guessed_key_is_not_told_from_a_wrong_one(keyring: Keyring) -> None:
    clock = Clock()
    throttle = FailureThrottle(5, clock)
    fail(throttle, keyring, 5)
    for key in ("sk-guess-wrong", KEYS["bob"]):
        with pytest.raises(TooManyFailures) as caught:
            throttle.authenticate(keyring, caller(key))
        assert caught.value.retry_after_s == WINDOW_S
        assert caught.value.status == 429
    assert throttle.authenticate(keyring, caller(KEYS["bob"], "203.0.113.8")).id == "bob"
    clock.now += WINDOW_S
    assert throttle.authenticate(keyring, caller(KEYS["bob"])).id == "bob"


def test_a_key_that_was_good_from_there_goes_on(keyring: Keyring) -> None:
    throttle = FailureThrottle(5, Clock())
    throttle.authenticate(keyring, caller(KEYS["alice"]))
    fail(throttle, keyring, 5)
    assert throttle.authenticate(keyring, caller(KEYS["alice"])).id == "alice"
    with pytest.raises(TooManyFailures):
        throttle.authenticate(keyring, caller(KEYS["bob"]))


def test_the_window_slides_and_attempts_while_turned_away_do_not_prolong_it(keyring: Keyring) -> None:
    clock = Clock()
    throttle = FailureThrottle(2, clock)
    fail(throttle, keyring, 1)
    clock.now += 40
    fail(throttle, keyring, 1)
    for _ in range(10):
        with pytest.raises(TooManyFailures):
            throttle.authenticate(keyring, caller("sk-guess"))
    clock.now += 20
    fail(throttle, keyring, 1)
    with pytest.raises(TooManyFailures) as caught:
        throttle.authenticate(keyring, caller("sk-guess"))
    assert caught.value.retry_after_s == 40


def test_one_ipv6_network_is_one_address_and_a_missing_key_is_no_guess(keyring: Keyring) -> None:
    throttle = FailureThrottle(3, Clock())
    for number in range(3):
        fail(throttle, keyring, 1, f"2001:db8:0:1::{number}")
    with pytest.raises(TooManyFailures):
        throttle.authenticate(keyring, caller("sk-guess", "2001:db8:0:1::99"))
    fail(throttle, keyring, 1, "2001:db8:0:2::1")
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            throttle.authenticate(keyring, caller(None, "198.51.100.1"))
    fail(throttle, keyring, 1, "198.51.100.1")


def test_memory_is_bounded(keyring: Keyring) -> None:
    throttle = FailureThrottle(1, Clock())
    for number in range(10_050):
        fail(throttle, keyring, 1, f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(throttle._failures) == 10_000
