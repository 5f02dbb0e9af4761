"""ModelSettings: what an operator may say of a model's answers, for calls that do not say it themselves."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

CHAT_ALONE = ("frequency_penalty", "presence_penalty")
"""Settings that the Responses API does not have."""


class ModelSettings(Struct, frozen=True, kw_only=True):
    """Values of the fields of the same name in a model call; None leaves them to the upstream."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None

    def given(self) -> dict[str, float | int]:
        """Return the settings that have a value, by name."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}


NAMES = ModelSettings.__struct_fields__
