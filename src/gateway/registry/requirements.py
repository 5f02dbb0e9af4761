"""What a drop-in's `requirements.txt` asks for, against the distributions that are installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.registry.entry import Diagnostic

if TYPE_CHECKING:  # a tenth of the time of a start, and few agents have a requirements.txt
    from packaging.requirements import Requirement

_MAX_BYTES = 256 * 1024
_CONTINUED = re.compile(r"\\\r?\n")
_COMMENT = re.compile(r"(^|\s)#.*$")
_PER_LINE_OPTION = re.compile(r"\s--(hash|config-settings|global-option)[= ]\S+")


def check_requirements(path: Path, label: str) -> tuple[Diagnostic, ...]:
    """Compare presence, version and environment markers; return what is missing or wrong, with the line that mends it.

    Options of pip (``-r``, ``--index-url`` …) are left to pip. ``label`` is how the file is shown.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            return (_invalid(label, None, f"The file is larger than {_MAX_BYTES // 1024} KiB."),)
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        return (_invalid(label, None, f"The file cannot be read as UTF-8 text ({type(error).__name__})."),)
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415 - see above

    problems: list[Diagnostic] = []
    unmet: list[str] = []
    first_line: int | None = None
    for number, line in _lines(text):
        if line.startswith("-"):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            why = str(error).splitlines()[0]
            problems.append(_invalid(label, number, f"'{line[:80]}' is not a requirement: {why}."))
            continue
        lack = _lack(requirement)
        if lack is not None:
            unmet.append(lack)
            first_line = first_line or number
    if unmet:
        problems.append(
            Diagnostic(
                kind="dependency",
                code="requirement_missing",
                message=f"Required and not installed: {'; '.join(unmet)}.",
                fix=f"In the folder of agents, run: python -m pip install -r {label}; then refresh the agents.",
                file=label,
                line=first_line,
            )
        )
    return tuple(problems)


def _lack(requirement: Requirement) -> str | None:
    """Say what is missing for one requirement; None if it is met or does not apply here."""
    from importlib import metadata  # noqa: PLC0415 - see above

    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    name = str(requirement).partition(";")[0].strip()
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return name
    if requirement.specifier and not requirement.specifier.contains(installed, prereleases=True):
        return f"{name} (installed: {installed})"
    return None


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the requirement lines with their numbers; continued lines joined, comments and hashes removed."""
    joined = _CONTINUED.sub(lambda found: " \0", text)
    number, lines = 1, []
    for line in joined.splitlines():
        content = _PER_LINE_OPTION.sub("", " " + _COMMENT.sub("", line.replace("\0", ""))).strip()
        if content:
            lines.append((number, content))
        number += 1 + line.count("\0")
    return lines


def _invalid(label: str, line: int | None, message: str) -> Diagnostic:
    return Diagnostic(
        kind="dependency",
        code="invalid_requirements",
        message=message,
        fix="Write one requirement per line, for instance: httpx2>=2,<3",
        file=label,
        line=line,
    )
