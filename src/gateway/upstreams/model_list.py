"""The model list of an upstream, read with suspicion: bounded, names only."""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from gateway.errors import UpstreamMalformed

MOST_MODELS = 2_000
_NAME = re.compile(r"[!-~]{1,200}")


class _Model(Struct):
    id: str = ""


class _List(Struct):
    data: list[_Model] = []


_OBJECT = msgspec.json.Decoder(_List)
_ARRAY = msgspec.json.Decoder(list[_Model])


def read_model_list(upstream: str, data: bytes) -> tuple[str, ...]:
    """Return the names in ``{"data": [{"id": …}]}`` or in a bare list of such objects (Together's form).

    Names that could not be asked for (blanks, other alphabets, endless ones) are left out, and so is all beyond
    `MOST_MODELS`. Raises `UpstreamMalformed`.
    """
    try:
        models = _ARRAY.decode(data) if data.lstrip().startswith(b"[") else _OBJECT.decode(data).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamMalformed(f"The upstream '{upstream}' does not answer /models with a list of models.") from error
    # Gemini's list has its ids as `models/NAME`, which its chat endpoint takes as NAME, too.
    names = (model.id.removeprefix("models/") for model in models)
    return tuple(dict.fromkeys(name for name in names if _NAME.fullmatch(name)))[:MOST_MODELS]
