"""FailureThrottle: an address that shows wrong keys again and again is turned away for a while."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache

from gateway.errors import GatewayError, TooManyFailures, Unauthenticated
from gateway.observability.logs import log_event
from gateway.principal import Principal
from gateway.security.keys import Caller, Keyring

WINDOW_S = 60.0
_ADDRESSES = 10_000
_GOOD_PAIRS = 50_000

_log = logging.getLogger("gateway.security")


class FailureThrottle:
    """Authenticates, and counts what each address got wrong.

    An address with ``per_minute`` failures within sixty seconds is answered 429, with whatever key: a right
    one that is only guessed looks the same as a wrong one. A key that was good from that address before goes on
    working, so that nobody is locked out by a neighbour behind the same proxy. An IPv6 address counts as its /64.
    Memory is bounded: the address that failed longest ago is forgotten first. ``count`` is told of every caller: what
    it showed, what came of it.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        count: Callable[[str, str], None] = lambda method, outcome: None,
    ) -> None:
        self._limit = per_minute
        self._clock = clock
        self._count = count
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._good: OrderedDict[tuple[str, str], None] = OrderedDict()

    def authenticate(self, keyring: Keyring, caller: Caller) -> Principal:
        """Return the principal behind a request; raise `Unauthenticated`, or `TooManyFailures` for the address."""
        shown = "none" if caller.authorization is None and caller.x_api_key is None else "key"
        try:
            principal = self._authenticate(keyring, caller)
        except GatewayError as error:
            self._count(shown, _outcome(error, shown))
            raise
        self._count("token" if principal.issuer is not None else shown, "accepted")
        return principal

    def _authenticate(self, keyring: Keyring, caller: Caller) -> Principal:
        if caller.peer is None:
            return keyring.authenticate(caller)
        wait_s = self._wait_s(caller.peer) if self._failures else 0.0
        try:
            principal = keyring.authenticate(caller)
        except Unauthenticated as error:
            if wait_s:
                raise _turned_away(wait_s) from error
            if caller.authorization is not None or caller.x_api_key is not None:  # showing no key guesses nothing
                self._note(caller.peer)
            raise
        good = caller.peer, principal.key_id
        if good not in self._good:
            if wait_s:
                raise _turned_away(wait_s)
            self._good[good] = None
            if len(self._good) > _GOOD_PAIRS:
                self._good.popitem(last=False)
        return principal

    def _wait_s(self, peer: str) -> float:
        """Seconds until the address may try again; 0 when it may now."""
        failures = self._failures.get(_network(peer))
        if failures is None or len(failures) < self._limit:
            return 0.0
        return max(0.0, failures[0] + WINDOW_S - self._clock())

    def _note(self, peer: str) -> None:
        network = _network(peer)
        failures = self._failures.get(network)
        if failures is None:
            failures = self._failures[network] = deque(maxlen=self._limit)
            if len(self._failures) > _ADDRESSES:
                self._failures.popitem(last=False)
        failures.append(self._clock())
        self._failures.move_to_end(network)
        if self._wait_s(peer):
            log_event(
                _log,
                "api_key.throttled",
                level=logging.WARNING,
                message=f"{self._limit} wrong keys within a minute: the address is turned away until it has waited.",
                client_ip=peer,
            )


def _outcome(error: GatewayError, shown: str) -> str:
    match error:
        case TooManyFailures():
            return "throttled"
        case Unauthenticated():
            return "missing" if shown == "none" else "refused"
        case _:
            return "unavailable"


def _turned_away(wait_s: float) -> TooManyFailures:
    return TooManyFailures(
        "Too many wrong API keys came from your address. Wait, check the key, and send the request again.",
        retry_after_s=wait_s,
    )


@lru_cache(maxsize=4096)
def _network(peer: str) -> str:
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)
