"""Chunk: one event of an upstream's stream as its judge has read it, so that nobody need read it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Raw, Struct


class Delta(Struct, gc=False):
    """The part of a chat choice that says what is new."""

    content: Any = None


class Choice(Struct, gc=False):
    """What the gateway reads of one choice of a chunk."""

    index: int = 0
    finish_reason: str | None = None
    delta: Delta | None = None
    text: Any = None


class Frame(Struct, frozen=True, eq=False):
    """What consecutive chunks of a stream have in common: the ``fields`` in front of ``choices``.

    ``head`` are the bytes of a chunk up to the value of ``choices``. ``usage``, ``error`` and ``obfuscation``, which
    change from chunk to chunk, are never among the fields.
    """

    head: bytes
    fields: Mapping[str, Raw]


class Chunk(Struct, eq=False):
    """One judged event; ``data`` is its payload.

    Where the judge found a ``frame``, ``data`` is nothing but that frame's head, the ``choices`` up to ``end``, an
    ``obfuscation`` (``padding``, with the comma before it) and a ``usage`` of null.
    """

    data: bytes
    frame: Frame | None = None
    choices: Sequence[Choice] = ()
    end: int = 0
    padding: bytes = b""
