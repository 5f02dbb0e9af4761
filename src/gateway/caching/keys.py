"""The key of an answer: a digest of everything that may change it, and of who may see it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import Raw

from gateway.caching.config import Sharing
from gateway.principal import Principal

_FORMAT = "1"
"""Part of every key: another meaning of keys or entries gets another number."""

_NEVER_COUNTS = frozenset({"metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "model"})
"""Labels of a request, and hints to the upstream's own cache. ``model`` counts as the name it was resolved to."""

_IDENTITY = frozenset({"user", "safety_identifier"})
"""Who is behind the caller: kept apart, unless the operator said that answers are everyone's."""

_TOOLS = ("tools", "tool_choice", "functions", "function_call", "web_search_options")
_EMPTY = (b"null", b"[]")


def uses_tools(fields: Mapping[str, Raw]) -> bool:
    """Whether a request offers tools to the model, or asks for a tool of the upstream."""
    return any(name in fields and bytes(fields[name]) not in _EMPTY for name in _TOOLS)


def is_stored_upstream(fields: Mapping[str, Raw]) -> bool:
    """Whether a request has an effect beyond its answer: the upstream is to keep it."""
    return "store" in fields and bytes(fields["store"]) == b"true"


def answer_key(
    *,
    principal: Principal,
    sharing: Sharing,
    path: str,
    model: str,
    streamed: bool,
    targets: Iterable[tuple[str, str, str]],
    fields: Mapping[str, Raw],
) -> str:
    """Return the key of a request's answer, as hex digits.

    ``targets`` are the upstreams that may serve it: name, address, model. Fields count with every byte of their JSON
    but the whitespace between its tokens, so that two bodies share a key only if every parser reads them alike.
    """
    scope = {
        "key": [principal.tenant, principal.namespace, principal.key_id],
        "namespace": [principal.tenant, principal.namespace],
        "everyone": [principal.tenant],
    }[sharing]
    digest = hashlib.sha256(msgspec.json.encode([_FORMAT, sharing, scope, path, model, streamed, list(targets)]))
    left_out = _NEVER_COUNTS | _IDENTITY if sharing == "everyone" else _NEVER_COUNTS
    for name in sorted(fields):
        if name in left_out or (name == "stream") or (name == "stream_options" and not streamed):
            continue
        value = msgspec.json.format(bytes(fields[name]), indent=-1)
        digest.update(b"\0%d:%b\0%d:" % (len(name), str(name).encode(), len(value)))
        digest.update(value)
    return digest.hexdigest()
