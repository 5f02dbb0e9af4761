"""A multipart form on its way through: its field ``model`` is read and replaced, everything else passes as bytes.

What two parsers could read differently is refused rather than guessed, and the form goes out under a boundary of our
own, so that what was data here cannot be a field there.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from gateway.errors import InvalidRequest

HEADER_BYTES = 8 * 1024
MODEL_BYTES = 512
MOST_PARTS = 1_000
_NOTED = {b"n", b"size", b"quality", b"user"}
_NOTED_BYTES = 256
_MODEL_HEAD = b'Content-Disposition: form-data; name="model"'
"""Nothing else: under an encoding or a character set of the client's, another parser might read another name."""

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=?-]{1,70}")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_DISPOSITION = re.compile(rb'form-data((?:;[ \t]*[a-z]+\*?=(?:"[^"]*"|[^\s";,]+)[ \t]*)+)', re.IGNORECASE)
_PARAMETER = re.compile(rb';[ \t]*([a-z]+\*?)=(?:"([^"]*)"|([^\s";,]+))', re.IGNORECASE)


def find_boundary(content_type: str) -> str:
    """Return the boundary of a ``multipart/form-data`` content type; raise `InvalidRequest`."""
    found = [
        part.partition("=")[2].strip().removeprefix('"').removesuffix('"')
        for part in content_type.split(";")[1:]
        if part.partition("=")[0].strip().lower() == "boundary"
    ]
    if len(found) != 1 or not _BOUNDARY.fullmatch(found[0]):
        raise InvalidRequest("The content type multipart/form-data must name one boundary.")
    return found[0]


class FormRewriter:
    """Reads a form piece by piece and gives out what goes to the upstream.

    ``rename`` is called once with the value of ``model`` and returns what stands there instead. ``growth`` is how many
    bytes the form has grown by then; None where only the end tells. ``model`` is None until the field has come.
    ``noted`` are the fields that say how much is asked for and for whom, as far as they have come.
    """

    def __init__(self, boundary: str, rename: Callable[[str], str]) -> None:
        # As long as the client's, so that the size stays known, unless that one could be guessed.
        self.boundary = secrets.token_hex(16) if len(boundary) < 16 else secrets.token_hex(35)[: len(boundary)]
        self.growth: int | None = 0 if len(self.boundary) == len(boundary) else None
        self.model: str | None = None
        self.noted: dict[str, str] = {}
        self._note: bytearray | None = None
        self._note_name = ""
        self._rename = rename
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._own = b"\r\n--" + self.boundary.encode("ascii")
        # A form begins with its delimiter; the line end before the first one is thought.
        self._held = b"\r\n"
        self._state = self._between
        self._parts = 0
        self._value: bytearray | None = None
        self._out: list[bytes] = []
        self.ended = False

    @property
    def content_type(self) -> str:
        """The content type that goes out."""
        return f"multipart/form-data; boundary={self.boundary}"

    def feed(self, piece: bytes) -> bytes:
        """Take bytes of the client; return bytes for the upstream. Raises `InvalidRequest`, or as ``rename`` does."""
        self._held += piece
        while self._state():
            pass
        out, self._out = b"".join(self._out), []
        return out

    def finish(self) -> None:
        """Say that nothing more comes; raise `InvalidRequest` for a form without an end."""
        if not self.ended or self._held:
            raise _refused("it ends before its last boundary")

    # States: each takes what it can from `_held` and returns whether the next one may go on.

    def _between(self) -> bool:
        """At the start, where the first delimiter must stand."""
        if len(self._held) < len(self._delimiter):
            if not self._delimiter.startswith(self._held):
                raise _refused("it does not begin with its boundary")
            return False
        if not self._held.startswith(self._delimiter):
            raise _refused("it does not begin with its boundary")
        self._held = self._held[len(self._delimiter) :]
        self._out.append(self._own[2:])
        self._state = self._after_delimiter
        return True

    def _after_delimiter(self) -> bool:
        if len(self._held) < 2:
            return False
        end, self._held = self._held[:2], self._held[2:]
        self._out.append(end)
        if end == b"\r\n":
            self._parts += 1
            if self._parts > MOST_PARTS:
                raise _refused(f"it has more than {MOST_PARTS} parts")
            self._state = self._headers
        elif end == b"--":
            self.ended = True
            self._state = self._epilogue
        else:
            raise _refused("a boundary is followed by something else than a line end")
        return True

    def _headers(self) -> bool:
        end = self._held.find(b"\r\n\r\n")
        if end < 0 or end > HEADER_BYTES:
            if len(self._held) > HEADER_BYTES:
                raise _refused("the headers of a part are too long")
            return False
        head, self._held = self._held[:end], self._held[end + 4 :]
        name = _field_of(head)
        if name in _NOTED:
            self._note, self._note_name = bytearray(), name.decode()
        if name == b"model":
            if self.model is not None:
                raise InvalidRequest("The form has the field 'model' more than once; send it once.", param="model")
            self._value = bytearray()
            if self.growth is not None:
                self.growth += len(_MODEL_HEAD) - len(head)
            head = _MODEL_HEAD
        self._out.append(head + b"\r\n\r\n")
        self._state = self._data
        return True

    def _data(self) -> bool:
        end = self._held.find(self._delimiter)
        if end < 0:
            # The last bytes may be the beginning of a delimiter.
            keep = len(self._delimiter) - 1
            taken, self._held = self._held[:-keep], self._held[-keep:]
        else:
            taken, self._held = self._held[:end], self._held[end + len(self._delimiter) :]
        if self._value is None:
            self._out.append(taken)
            if self._note is not None and len(self._note) <= _NOTED_BYTES:
                self._note += taken[: _NOTED_BYTES + 1]
        else:
            self._value += taken
            if len(self._value) > MODEL_BYTES:
                raise InvalidRequest("The field 'model' is too long.", param="model")
        if end < 0:
            return False
        if self._value is not None:
            self._replace(bytes(self._value))
            self._value = None
        if self._note is not None:
            if len(self._note) <= _NOTED_BYTES:
                self.noted[self._note_name] = self._note.decode("utf-8", "replace")
            self._note = None
        self._out.append(self._own)
        self._state = self._after_delimiter
        return True

    def _epilogue(self) -> bool:
        if not b"\r\n".startswith(self._held):
            raise _refused("something follows its last boundary")
        if self._held == b"\r\n":
            self._out.append(self._held)
            self._held = b""
            self._state = self._nothing
        return False

    def _nothing(self) -> bool:
        if self._held:
            raise _refused("something follows its last boundary")
        return False

    def _replace(self, value: bytes) -> None:
        try:
            self.model = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest("The field 'model' is not valid UTF-8.", param="model") from error
        new = self._rename(self.model).encode()
        self._out.append(new)
        if self.growth is not None:
            self.growth += len(new) - len(value)


def _field_of(head: bytes) -> bytes:
    """Judge the headers of a part; return the name of its field, b"" for a file's."""
    dispositions = []
    for line in head.split(b"\r\n"):
        found = _HEADER.fullmatch(line)
        if found is None:
            raise _refused("a part has a malformed header")
        if found.group(1).lower() == b"content-disposition":
            dispositions.append(found.group(2).strip())
    if len(dispositions) != 1 or not (found := _DISPOSITION.fullmatch(dispositions[0])):
        raise _refused("a part has no proper Content-Disposition")
    given = [(name.lower(), quoted or token) for name, quoted, token in _PARAMETER.findall(found.group(1))]
    parameters = dict(given)
    name: bytes | None = parameters.get(b"name")
    if len(parameters) != len(given) or name is None or b"name*" in parameters or b"\\" in name:
        raise _refused("a part has no proper name")
    if name == b"model":
        if parameters.keys() != {b"name"}:
            raise InvalidRequest("The field 'model' must be plain text.", param="model")
        return name
    if name.strip().rstrip(b"[]").lower() == b"model":
        raise _refused(f"a field is called '{name.decode('latin-1')[:32]}'; write 'model'")
    return name if parameters.keys() == {b"name"} else b""


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"The form cannot be relayed: {why}.")
