"""CallerContext: what a caller sends along for those who act in its name, in headers: credentials, choices, who it is.

`X-Cred-{Service}-{Key}` and `X-AWS-*` are credentials, `X-Provider` and `X-Provider-{Primitive}` the providers it
wants, `X-Agent-Id` the agent it is. Only who runs tools reads them; a relayed call never looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from msgspec import Struct

from gateway.errors import InvalidRequest

MOST_HEADERS = 32
LONGEST_VALUE = 8_192
_PREFIXES = ("x-cred-", "x-aws-", "x-provider-")
_NAMES = frozenset({"x-provider", "x-agent-id"})
_CREDENTIAL = re.compile(r"x-cred-([a-z0-9_]{1,64})-([a-z0-9_-]{1,64})")
_AWS = {f"x-aws-{name.replace('_', '-')}": name for name in ("access_key_id", "secret_access_key", "session_token")}
_REGION = "x-aws-region"
_PROVIDER = re.compile(r"x-provider(?:-([a-z0-9-]{1,64}))?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_LEADS_ELSEWHERE = frozenset({"url", "uri", "host", "hostname", "endpoint", "origin", "port"})
"""A credential of that name would send whoever uses it to an address of the caller's choice."""

_SHORTEST_SECRET = 6
ALL = "*"
"""Stands in `CallerContext.providers` for every primitive that is not named."""

T = TypeVar("T")


class Hidden(Mapping[str, T]):
    """A mapping that never shows its values by itself; what is missing is said in a sentence."""

    __slots__ = ("_missing", "_values")

    def __init__(self, values: Mapping[str, T], missing: str) -> None:
        self._values, self._missing = values, missing

    def __getitem__(self, name: str) -> T:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(self._missing.replace("{}", str(name).replace("_", "-"))) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        return f"<{', '.join(self._values) or 'nothing'}>"


Credentials = Hidden[Hidden[str]]

_NO_CREDENTIALS: Credentials = Hidden({}, "the caller sent no credential for '{}': ask it for x-cred-{}-…")


class CallerContext(Struct, frozen=True):
    """What one caller sent along with one request.

    ``credentials`` are by service and key, both lower-case, with ``_`` for ``-`` in the key. ``providers`` are by
    primitive; `ALL` stands for those not named. ``refused`` are headers that were left out, by name. ``sent`` holds
    the headers of credentials as they came, by lower-case name.
    """

    credentials: Credentials = _NO_CREDENTIALS
    providers: Mapping[str, str] = {}
    agent_id: str | None = None
    refused: tuple[str, ...] = ()
    sent: Hidden[str] = Hidden({}, "the caller sent no header '{}'")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be read anywhere else, the longest first."""
        found = {value for name, value in self.sent.items() if name != _REGION and len(value) >= _SHORTEST_SECRET}
        return tuple(sorted(found, key=len, reverse=True))


NOTHING = CallerContext()


def read_caller_context(headers: Mapping[str, str]) -> CallerContext:
    """Read the headers of a request, by lower-case name; `InvalidRequest` naming one that makes no sense."""
    given = {name: value.strip() for name, value in headers.items() if name.startswith(_PREFIXES) or name in _NAMES}
    if not given:
        return NOTHING
    services: dict[str, dict[str, str]] = {}
    sent, refused, providers = dict[str, str](), list[str](), dict[str, str]()
    for name, value in given.items():
        if not value:
            continue
        if name.startswith("x-provider"):
            found = _PROVIDER.fullmatch(name)
            if found is None:
                raise _wrong(name, "write x-provider, or x-provider- and the name of a primitive")
            providers[(found[1] or ALL).replace("-", "_")] = _word(name, value)
        elif (place := credential_place(name)) is not None:
            if not (value.isascii() and value.isprintable()) or len(value) > LONGEST_VALUE:
                raise _wrong(name, f"its value has more than {LONGEST_VALUE:,} characters, or one outside ASCII")
            if leads_elsewhere(place[1]):
                refused.append(name)
                continue
            sent[name] = value
            services.setdefault(place[0], {})[place[1]] = value
        elif name.startswith("x-cred-"):
            raise _wrong(name, "write x-cred-, a service of letters, digits and '_', '-', and the name of the value")
    if len(sent) + len(providers) > MOST_HEADERS:
        raise InvalidRequest(
            f"More than {MOST_HEADERS} headers of credentials and providers. Send those that are used."
        )
    agent_id = given.get("x-agent-id")
    return CallerContext(
        credentials=_credentials(services),
        providers=providers,
        agent_id=_word("x-agent-id", agent_id) if agent_id else None,
        refused=tuple(refused),
        sent=Hidden(sent, "the caller sent no header '{}'"),
    )


def credential_place(header: str) -> tuple[str, str] | None:
    """Return service and key that a header (lower-case) stands for; None for one that holds no credential."""
    if header.startswith("x-aws-"):
        if header == _REGION:
            return "aws", "region"
        return ("aws", _AWS[header]) if header in _AWS else None
    found = _CREDENTIAL.fullmatch(header)
    return (found[1], found[2].replace("-", "_")) if found is not None else None


def leads_elsewhere(key: str) -> bool:
    """Whether a value of that name would be an address rather than a credential."""
    return not _LEADS_ELSEWHERE.isdisjoint(key.split("_"))


def masked(text: str, secrets: Iterable[str]) -> str:
    """Return ``text`` without the secrets in it."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _credentials(services: Mapping[str, Mapping[str, str]]) -> Credentials:
    return Hidden(
        {
            service: Hidden(values, f"the caller sent no '{{}}' for '{service}': ask it for x-cred-{service}-{{}}")
            for service, values in services.items()
        },
        "the caller sent no credential for '{}': ask it for x-cred-{}-…",
    )


def _word(name: str, value: str) -> str:
    if not _WORD.fullmatch(value):
        raise _wrong(name, "its value is a name: up to 128 letters, digits and . _ : / -")
    return value


def _wrong(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"The header {name[:160]} is not understood: {why}.", code="invalid_header")
