"""What calls are charged by that are not counted in tokens: pictures, characters, seconds of sound.

An answer's own word counts first; where it has none, what was asked for stands in, as an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

SPEECH_PATH = "/audio/speech"
WRITING_PATHS = frozenset({"/audio/transcriptions", "/audio/translations"})
IMAGE_PATHS = frozenset({"/images/generations", "/images/edits", "/images/variations"})
ASKED_FIELDS = ("n", "size", "quality", "input")
"""The fields of a request that say how much it asks for."""

CHARACTERS_PER_SECOND = 15
"""Of a text that is spoken: as long as a transcription is taken for where nothing says how long it was."""
_LEAST_BYTES_PER_S = 1_000
"""Of speech in the thriftiest codec that is common: an upload holds no more seconds than this allows."""
_MOST_IMAGES = 10
_MOST = 10**9


class Measured(Struct, frozen=True):
    """What one call is charged by. ``milliseconds`` are those of sound; ``size`` and ``quality`` are the pictures'.

    ``estimated``: by what was asked for, not by what the answer says.
    """

    images: int = 0
    size: str | None = None
    quality: str | None = None
    characters: int = 0
    milliseconds: int = 0
    estimated: bool = False

    def __bool__(self) -> bool:
        return bool(self.images or self.characters or self.milliseconds)


NOTHING_MEASURED = Measured()


class Asked(Struct, frozen=True):
    """What a request asks for. ``images`` None: the part of its form that would say so has not come yet.

    ``upload_bytes`` is the size of a form, its file included.
    """

    path: str
    images: int | None = 1
    size: str | None = None
    quality: str | None = None
    characters: int = 0
    upload_bytes: int = 0

    @property
    def is_promised(self) -> bool:
        """Whether the answer cannot be charged by more than `most`."""
        return self.path not in WRITING_PATHS and (self.path not in IMAGE_PATHS or self.images is not None)

    def most(self) -> Measured:
        """Return the most that the answer may be charged by."""
        if self.path in IMAGE_PATHS:
            return Measured(self.images or _MOST_IMAGES, self.size, self.quality)
        if self.path in WRITING_PATHS:
            return Measured(milliseconds=self.upload_bytes * 1000 // _LEAST_BYTES_PER_S)
        return Measured(characters=self.characters)

    def answered(self, said: Measured, written_characters: int) -> Measured:
        """Return what the answer is charged by: what it ``said`` itself, else what was asked for."""
        if self.path in IMAGE_PATHS:
            size, quality = said.size or self.size, said.quality or self.quality
            if said.images:
                return Measured(said.images, size, quality)
            return Measured(self.images or 1, size, quality, estimated=True)
        if self.path in WRITING_PATHS:
            if said.milliseconds:
                return said
            return Measured(milliseconds=written_characters * 1000 // CHARACTERS_PER_SECOND, estimated=True)
        return Measured(characters=self.characters, estimated=True) if self.characters else NOTHING_MEASURED


def asked_of(path: str, fields: Mapping[str, object], upload_bytes: int = 0, *, is_whole: bool = True) -> Asked:
    """Return what a request asks for; ``fields`` are those of `ASKED_FIELDS` that it has, in a form all text.

    Fields may be missing in one that is not ``is_whole``.
    """
    text = fields.get("input")
    return Asked(
        path,
        images=_count(fields.get("n")) or (1 if is_whole else None),
        size=_word(fields.get("size")),
        quality=_word(fields.get("quality")),
        characters=len(text) if path == SPEECH_PATH and isinstance(text, str) else 0,
        upload_bytes=upload_bytes,
    )


def _count(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:10])
    return min(value, _MOST) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _word(value: object) -> str | None:
    return value[:32] if isinstance(value, str) and value else None
