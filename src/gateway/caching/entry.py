"""Entry: one finished answer as a cache keeps it, and the one place that says which answers are worth keeping."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Raw, Struct

_OVERHEAD_BYTES = 512
"""What an entry costs beside its bytes: key, objects, tables."""


class Entry(Struct, frozen=True, array_like=True):
    """A whole answer (one part) or the chunks of a stream. ``stored_at`` is in epoch seconds."""

    stored_at: float
    finish_reason: str
    parts: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes it takes in memory, about."""
        return sum(map(len, self.parts)) + _OVERHEAD_BYTES


def encode_entry(entry: Entry) -> bytes:
    """Return an entry as bytes."""
    return _ENCODER.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """Return the entry; raise ``msgspec.DecodeError`` (or its `ValidationError`) for bytes that are none."""
    return _DECODER.decode(data)


def is_finished(parts: Sequence[bytes], reasons: frozenset[str]) -> bool:
    """Whether every choice of an answer ended, and for one of these reasons; an answer without choices has no say."""
    begun, ended = set[int](), set[int]()
    for part in parts:
        try:
            choices = _ENDS.decode(part).choices or ()
        except msgspec.DecodeError:
            return False
        for choice in choices:
            begun.add(choice.index)
            if choice.finish_reason is not None:
                if choice.finish_reason not in reasons:
                    return False
                ended.add(choice.index)
    return begun == ended


def with_id(part: bytes, new_id: str) -> bytes:
    """Return a JSON object with another ``id``, if it has one."""
    fields = _FIELDS.decode(part)
    if "id" not in fields:
        return part
    fields["id"] = Raw(msgspec.json.encode(new_id))
    return msgspec.json.encode(fields)


class _End(Struct):
    index: int = 0
    finish_reason: str | None = None


class _Ends(Struct):
    choices: list[_End] | None = None


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Entry)
_ENDS = msgspec.json.Decoder(_Ends)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
