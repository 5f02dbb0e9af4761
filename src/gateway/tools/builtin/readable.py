"""From HTML to the text that a reader sees: title, and lines of words.

One pass from left to right over the page, whatever it is: strangers write it, and the time grows with its length alone.
"""

from __future__ import annotations

import html
import re

from msgspec import Struct

_SILENT = frozenset({"iframe", "noscript", "object", "script", "style", "svg", "template", "textarea"})
"""Elements whose content nobody reads."""

_BREAKING = re.compile(
    "address|article|aside|blockquote|body|br|d[dlt]|div|fieldset|fig(ure|caption)|footer|form|h[1-6r]|header|li|main|nav|"
    "[ou]l|option|p|pre|section|t(able|d|h|r)"
)
_NAME = re.compile(r"/?[A-Za-z][A-Za-z0-9-]{0,30}")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}(?![0-9])|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});?")
_BLANKS = re.compile(r"[ \t\r\f\v\u00a0]+")


class Readable(Struct, frozen=True, kw_only=True):
    """What a page says."""

    title: str
    text: str


def readable(page: str) -> Readable:
    """Return what a page says; text that is not HTML stays what it is."""
    parts: list[str] = []
    title, at = "", 0
    while at < len(page):
        start = _at(page, "<", at)
        parts.append(page[at:start])
        found = _NAME.match(page, start + 1)
        if page.startswith("<!--", start):
            at = _behind(page, "-->", start + 4)
        elif page.startswith(("<!", "<?"), start):
            at = _behind(page, ">", start)
        elif found is None:
            parts.append(page[start : start + 1])
            at = start + 1
        else:
            at = _behind(page, ">", start)
            name = found[0].lower()
            if name == "title":
                end = _end_of(page, name, at)
                title = title or page[at:end]
                at = end
            elif name in _SILENT and not page.startswith("/>", at - 2):
                at = _end_of(page, name, at)
            elif _BREAKING.fullmatch(name.removeprefix("/")):
                parts.append("\n")
    return Readable(title=_lines(title).replace("\n", " ")[:300], text=_lines("".join(parts)))


def _end_of(page: str, name: str, at: int) -> int:
    found = re.compile(f"</{name}", re.IGNORECASE).search(page, at)
    return found.start() if found else len(page)


def _behind(page: str, mark: str, at: int) -> int:
    return _at(page, mark, at) + len(mark)


def _at(page: str, mark: str, at: int) -> int:
    found = page.find(mark, at)
    return len(page) if found < 0 else found


def _lines(text: str) -> str:
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    lines = (_BLANKS.sub(" ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
