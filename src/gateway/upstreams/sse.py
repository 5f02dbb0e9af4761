"""Server-sent events from raw bytes: any line ending, any split, bounded memory.

Follows the WHATWG event stream format, of which only ``data`` matters here: comments, ``event``, ``id`` and ``retry``
are read over, and an event that the end of the stream cuts is never given out.
"""

from __future__ import annotations

_BOM = b"\xef\xbb\xbf"
_KNOWN_FIELDS = (b"data", b"event", b"id", b"retry")


class EventTooLarge(Exception):
    """A line or an event passed the limit."""


class EventParser:
    """Turns pieces of a body into the payloads of its events."""

    __slots__ = ("_after_cr", "_data", "_first_line", "_held", "_limit", "strange")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = bytearray()
        self._data: bytes | bytearray | None = None
        self._after_cr = False
        self._first_line = True
        self.strange = False
        """Whether a line was seen that no event stream has, such as HTML."""

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the payloads that ``piece`` completes; raise `EventTooLarge`."""
        size = len(piece)
        if (
            # One line and the end of its event, with nothing before it that is not complete: as most pieces are.
            piece.find(b"\n") == size - 2
            and piece.startswith(b"data: ")
            and piece.endswith(b"\n\n")
            and 8 < size <= self._limit
            and not self._held
            and self._data is None
            and b"\r" not in piece
        ):
            self._after_cr = self._first_line = False
            return [piece[6:-2]]
        if self._after_cr:
            self._after_cr = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = piece.split(b"\n")
        last = lines.pop()
        events: list[bytes] = []
        if lines:
            if self._held:
                self._held += lines[0]
                lines[0] = bytes(self._held)
                self._held.clear()
            if self._first_line:
                self._first_line = False
                lines[0] = lines[0].removeprefix(_BOM)
            for line in lines:
                self._take(line, events)
        if last:
            self._held += last
            if len(self._held) + len(self._data or b"") > self._limit:
                raise EventTooLarge
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._add(line[6:] if line.startswith(b"data: ") else line[5:])
        elif not line:
            if self._data:
                events.append(bytes(self._data))
            self._data = None
        elif not line.startswith(b":"):
            name = line.partition(b":")[0]
            if name == b"data":
                self._add(b"")
            elif name not in _KNOWN_FIELDS:
                self.strange = True

    def _add(self, value: bytes) -> None:
        if self._data is None:
            self._data = value
        else:
            if isinstance(self._data, bytes):
                self._data = bytearray(self._data)
            self._data += b"\n"
            self._data += value
        if len(self._data) > self._limit:
            raise EventTooLarge
