"""What others wrote, as a terminal may be shown it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text with a sign for each character that could steer a terminal, or end the line."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
