"""`caller_headers` of `tools.yaml`: headers of the caller's own request that a tool's server is given."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.caller_context import CallerContext, credential_place, leads_elsewhere
from gateway.errors import ConfigError, ToolUnavailable
from gateway.tools.port import ToolContext

_KEYS_OF_OURS = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})
"""Headers that hold the caller's key of this gateway, which no server is to see."""

_HOPS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "accept", "accept-encoding", "content-type", "expect"}
)


def check_caller_headers(headers: Mapping[str, str], where: str) -> None:
    """Raise `ConfigError` for one that can never be sent, or never should."""
    for name, text in headers.items():
        source = text.rpartition(" ")[2]
        asked = source.lower()
        if asked in _KEYS_OF_OURS:
            raise ConfigError(
                f"{where}: caller_headers: '{source}' holds the caller's key of this gateway, which no "
                "server is to see; choose a header of its own, such as x-cred-github-token."
            )
        place = credential_place(asked)
        if asked.startswith("x-cred-") and (place is None or leads_elsewhere(place[1])):
            raise ConfigError(
                f"{where}: caller_headers: '{source}' is none that a caller can send; write x-cred-SERVICE-KEY, with a "
                "key that names no address."
            )
        if name.lower() in _HOPS:
            raise ConfigError(f"{where}: caller_headers: '{name}' cannot be set.")
        if not name.isascii() or not name.isprintable() or not name or " " in name or ":" in name:
            raise ConfigError(f"{where}: caller_headers: {name!r} is not the name of a header.")


def find_missing(headers: Mapping[str, str], caller: CallerContext, sent: Mapping[str, str]) -> str | None:
    """Return the first header that a call needs of its caller and that the caller did not send."""
    for text in headers.values():
        asked = text.rpartition(" ")[2].lower()
        if caller.sent.get(asked) is None and sent.get(asked) is None:
            return text.rpartition(" ")[2]
    return None


def lent_headers(headers: Mapping[str, str], context: ToolContext, who: str) -> dict[str, str]:
    """Return what the caller sent for each, by lower-case name; `ToolUnavailable` naming one that it did not send.

    A value may stand behind a scheme word: ``Bearer x-cred-github-token``. ``who`` is the tool, for that sentence.
    """
    missing = find_missing(headers, context.caller, context.headers)
    if missing is not None:
        raise ToolUnavailable(
            f"{who} works with the caller's own credential: send it in the header '{missing}'.",
            should_retry=False,
        )
    found = {}
    for name, text in headers.items():
        scheme, space, source = text.rpartition(" ")
        asked = source.lower()
        value = context.caller.sent.get(asked) or context.headers.get(asked)
        found[name.lower()] = f"{scheme}{space}{value}"
    return found
