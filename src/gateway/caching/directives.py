"""What a request's own ``cache-control`` says."""

from __future__ import annotations

from msgspec import Struct


class CacheControl(Struct, frozen=True):
    """``no_cache``: a fresh answer is wanted, and may be kept; ``no_store``: the cache is left out altogether.

    ``max_age_s``: an older answer is not wanted.
    """

    no_cache: bool = False
    no_store: bool = False
    max_age_s: float | None = None


def read_cache_control(text: str | None) -> CacheControl:
    """Return the directives of the header; those that mean nothing to a cache of answers are ignored."""
    if not text:
        return _NONE
    no_cache = no_store = False
    max_age: float | None = None
    for part in text.lower().split(","):
        name, _, value = part.strip().partition("=")
        value = value.strip().strip('"')
        if name == "no-cache":
            no_cache = True
        elif name == "no-store":
            no_store = True
        elif name == "max-age" and value.isascii() and value.isdigit():
            max_age = float(value[:12])
    return CacheControl(no_cache or max_age == 0, no_store, max_age)


_NONE = CacheControl()
