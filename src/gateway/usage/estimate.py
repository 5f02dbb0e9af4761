"""An estimate of the tokens of a model call, for upstreams that give no numbers."""

from __future__ import annotations

from gateway.events import Usage

CHARACTERS_PER_TOKEN = 4


def estimate_usage(request_bytes: int, answer_characters: int) -> Usage:
    """Return the usage of one model call by the size of what went out and what came back; flagged as an estimate."""
    return Usage(
        input_tokens=request_bytes // CHARACTERS_PER_TOKEN,
        output_tokens=-(-answer_characters // CHARACTERS_PER_TOKEN),
        requests=1,
        estimated=True,
    )
