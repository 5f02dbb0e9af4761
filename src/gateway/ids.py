"""RandomIds: ids that nobody can guess, without a system call for each."""

from __future__ import annotations

import os
import uuid

_POOL_BYTES = 4096
_ID_BYTES = 16
_VERSION_4 = 4 << 76 | 2 << 62
_FREE = ((1 << 128) - 1) & ~(15 << 76 | 3 << 62)


class RandomIds:
    """Cuts ids of 128 bits from random bytes of the operating system, which it fetches for 256 ids at a time.

    An instance belongs to one process: a fork must not share what is left of a pool.
    """

    __slots__ = ("_at", "_pool")

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def take(self) -> bytes:
        """Return 16 random bytes that were never given out."""
        at = self._at
        if at >= len(self._pool):
            self._pool, at = os.urandom(_POOL_BYTES), 0
        self._at = at + _ID_BYTES
        return self._pool[at : self._at]

    def uuid(self) -> uuid.UUID:
        """Return a random UUID (version 4)."""
        # Version 4 and the variant of RFC 9562, set here: the constructor costs more than all the rest.
        made = uuid.UUID.__new__(uuid.UUID)
        object.__setattr__(made, "int", int.from_bytes(self.take()) & _FREE | _VERSION_4)
        object.__setattr__(made, "is_safe", uuid.SafeUUID.unknown)
        return made
