"""From an exception raised while a drop-in was loaded to the `Diagnostic` that tells its author what to do."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from gateway.registry.entry import Diagnostic, DiagnosticKind
from gateway.registry.loading import DropIn
from sdk_adapter.modules import Generation, ModuleBlocked, SourceRefused

_DISTRIBUTIONS = {
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "fitz": "pymupdf",
    "git": "GitPython",
    "jose": "python-jose",
    "jwt": "PyJWT",
    "magic": "python-magic",
    "PIL": "Pillow",
    "serial": "pyserial",
    "sklearn": "scikit-learn",
    "slugify": "python-slugify",
    "telegram": "python-telegram-bot",
    "yaml": "PyYAML",
    "zmq": "pyzmq",
}
"""Import names whose distribution is called differently."""

_SYNTHETIC = re.compile(r"_dropin_\d+_\w+(?:\.__outside__)?")
_SYNTHETIC_MODULE = re.compile(r"_dropin_\d+_\w+(?:\.__outside__)?\.")
_LONGEST_MESSAGE = 600


def diagnose(
    dropin: DropIn,
    code: str,
    message: str,
    fix: str,
    *,
    kind: DiagnosticKind = "validation",
    line: int | None = None,
    file: str | None = None,
    cause: str | None = None,
    module: str | None = None,
    is_warning: bool = False,
) -> Diagnostic:
    """Return a diagnostic about ``dropin``, stamped with the time; its own file unless another is named."""
    return Diagnostic(
        kind=kind,
        code=code,
        message=hide_paths(message, dropin),
        fix=hide_paths(fix, dropin),
        file=file or dropin.label,
        line=line,
        cause=hide_paths(cause, dropin) if cause else None,
        module=module,
        severity="warning" if is_warning else "error",
        occurred_at=time.time(),
    )


def explain(error: BaseException, dropin: DropIn, generation: Generation, *, what: str = "import") -> Diagnostic:
    """Say what went wrong in the author's terms: the line of their code, the cause, and the fix.

    ``what`` is what was going on (``import``, or the call of a factory).
    """
    file, line = _place(error, dropin, generation)
    if isinstance(error, ModuleBlocked):
        return diagnose(
            dropin,
            "blocked",
            error.violation.message,
            error.violation.fix,
            kind="security",
            file=label(error.file, dropin),
            line=error.violation.line,
            module=error.violation.module,
        )
    if isinstance(error, SourceRefused):
        kind: DiagnosticKind = "security" if error.code == "path_escapes_root" else "validation"
        return diagnose(dropin, error.code, error.message, error.fix, kind=kind, file=label(error.file, dropin))
    if isinstance(error, SyntaxError) and (error.filename is None or generation.owns(error.filename)):
        return _explain_syntax(error, dropin)
    if line is None and isinstance(error, ValueError) and "null bytes" in str(error):
        return diagnose(
            dropin,
            "undecodable",
            f"The file is not Python source text: {error}.",
            "Save it as UTF-8 text.",
            kind="import",
            file=file,
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _explain_missing(error, error.name, dropin, generation, file, line)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        did = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else "raised KeyboardInterrupt"
        return diagnose(
            dropin,
            "import_exit",
            f"The {what} {did}, which would have ended the gateway.",
            'Put what ends the program under: if __name__ == "__main__":',
            kind="import",
            file=file,
            line=line,
        )
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return diagnose(
        dropin,
        "import_error" if what == "import" else "factory_error",
        f"The {what} raised {cause}",
        _advice(error, file, line),
        kind="import",
        file=file,
        line=line,
        cause=_source_line(error, generation),
    )


def label(path: Path | str, dropin: DropIn) -> str:
    """Return how a file is shown: relative to the discovery root, else to its ``sys.path`` folder, else its name."""
    path = Path(path)
    if path.is_relative_to(dropin.root):
        return path.relative_to(dropin.root).as_posix()
    for folder in sys.path:
        if folder and path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name


def hide_paths(text: str, dropin: DropIn) -> str:
    """Remove what a reader must not learn or cannot use: folders of this machine, synthetic module names."""
    text = _SYNTHETIC.sub("", _SYNTHETIC_MODULE.sub("", text))
    folders = {str(dropin.root), *filter(os.path.isabs, sys.path), sys.prefix, sys.base_prefix, os.getcwd()}
    home = os.path.expanduser("~")
    if len(home) > 1:
        folders.add(home)
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(f"{folder}{os.sep}", "").replace(folder, ".")
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"


def nearest(name: str, known: list[str]) -> str:
    """Return ``Did you mean 'x'? `` or nothing."""
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f"Did you mean '{near[0]}'? " if near else ""


def _explain_syntax(error: SyntaxError, dropin: DropIn) -> Diagnostic:
    message = error.msg or "invalid syntax"
    file = label(error.filename, dropin) if error.filename else None
    if "null bytes" in message or "utf-8" in message.lower() or "encoding" in message.lower():
        fix = "Save it as UTF-8 text."
        return diagnose(
            dropin, "undecodable", f"The file is not Python source text: {message}.", fix, kind="import", file=file
        )
    text = (error.text or "").strip()
    return diagnose(
        dropin,
        "syntax_error",
        f"Python cannot read this line: {message}{'' if message.endswith('?') else '.'}",
        f"Correct the line{f': {text[:120]}' if text else ''}",
        kind="import",
        file=file,
        line=error.lineno,
        cause=text[:200] or None,
    )


def _explain_missing(
    error: ModuleNotFoundError, name: str, dropin: DropIn, generation: Generation, file: str, line: int | None
) -> Diagnostic:
    shown = _SYNTHETIC_MODULE.sub("", name)
    top = shown.partition(".")[0]
    if name != shown or name.startswith(generation.package):
        here = sorted(p.stem for p in dropin.folder.glob("*.py")) if dropin.module is None else []
        return diagnose(
            dropin,
            "missing_module",
            f"There is no file for the module '{shown}' in the drop-in's folder.",
            f"{nearest(top, here)}Files there: {', '.join(here) or 'none'}.",
            kind="import",
            file=file,
            line=line,
            module=shown,
        )
    if shown != top and _is_importable(top):
        return diagnose(
            dropin,
            "missing_module",
            f"The package '{top}' has no module '{shown}'.",
            f"Check the spelling, or the version of '{top}' that is installed.",
            kind="dependency",
            file=file,
            line=line,
            module=shown,
        )
    requirements = dropin.folder / "requirements.txt"
    how = (
        f"-r {label(requirements, dropin)}"
        if dropin.module is None and requirements.is_file()
        else _DISTRIBUTIONS.get(top, top.replace("_", "-"))
    )
    return diagnose(
        dropin,
        "missing_package",
        f"The package '{top}' is not installed ({error.msg}).",
        f"Run: python -m pip install {how}; then refresh the agents.",
        kind="dependency",
        file=file,
        line=line,
        module=top,
    )


def _is_importable(top: str) -> bool:
    return top in sys.modules or top in sys.stdlib_module_names


def _place(error: BaseException, dropin: DropIn, generation: Generation) -> tuple[str, int | None]:
    """Return the innermost line of the author's code that the exception passed through."""
    place: tuple[str, int | None] = (dropin.label, None)
    for frame, line in _author_frames(error, generation):
        place = (label(frame, dropin), line)
    return place


def _author_frames(error: BaseException, generation: Generation) -> Iterator[tuple[str, int]]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        if generation.owns(frame.f_code.co_filename):
            yield frame.f_code.co_filename, line


def _source_line(error: BaseException, generation: Generation) -> str | None:
    found = list(_author_frames(error, generation))
    if not found:
        return None
    file, line = found[-1]
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()[line - 1].strip()[:200]
    except (OSError, IndexError):
        return None


def _advice(error: BaseException, file: str, line: int | None) -> str:
    where = f"{file}:{line}" if line else file
    if isinstance(error, RuntimeError) and "event loop" in str(error):
        return f"Create objects that need an event loop inside an async factory (async def build_agent()); see {where}."
    if isinstance(error, KeyError) and error.args and str(error.args[0]).isupper():
        return f"Set the environment variable {error.args[0]} for the gateway, or read it with a default at {where}."
    if isinstance(error, FileNotFoundError):
        return f"Read files relative to the agent: Path(__file__).parent / 'name'; see {where}."
    return f"Mend {where}; the agent is loaded again when it is saved (or on POST /agents/refresh)."
