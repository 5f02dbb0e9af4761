"""Python files in the drop-in folders that no agent reaches, found by reading what the agents import.

Nothing is executed. A file counts as reached where an agent, or a file it reaches, imports it by whatever spelling, or
has its name (`server.py`) in a text, as agents do that start one as a process.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from gateway.config import Settings
from gateway.registry.discovery import discover, find_roots, list_sources
from gateway.registry.loading import DropIn

_SKIPPED = ("test_", "conftest")


def find_unreferenced(settings: Settings) -> list[str]:
    """Return the paths, relative to the working folder where they lie in it; tests are left out."""
    roots = find_roots(settings)
    reached: set[Path] = set()
    for found in discover(roots, settings.default_namespace):
        reached |= _reach(found.dropin)
    every = {path for root in roots if root.is_dir() for path in root.rglob("*.py") if _counts(path.relative_to(root))}
    return [_shown(path) for path in sorted(every - reached)]


def _reach(dropin: DropIn) -> set[Path]:
    """Return the file of a drop-in and every file of its folder that it leads to."""
    reached, waiting = {dropin.file}, [dropin.file]
    while waiting:
        path = waiting.pop()
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return {dropin.file, *list_sources(dropin)}  # nobody can say what it would import
        for candidate in _named(tree, path, dropin.folder):
            if candidate not in reached and candidate.is_file() and candidate.is_relative_to(dropin.folder):
                reached.add(candidate)
                waiting.append(candidate)
    return reached


def _named(tree: ast.Module, path: Path, folder: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield from _files(folder, alias.name)
            case ast.ImportFrom():
                base = folder if not node.level else path.parents[node.level - 1]
                yield from _files(base, node.module or "")
                for alias in node.names:
                    yield from _files(base, f"{node.module}.{alias.name}" if node.module else alias.name)
            case ast.Constant(value=str(text)) if text.endswith(".py"):
                yield path.parent / text
                yield folder / text
            case ast.Call(args=[ast.Constant(value=str(text)), *_]) if _is_import_call(node):
                yield from _files(folder, text.lstrip("."))


def _is_import_call(node: ast.Call) -> bool:
    return ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")


def _files(base: Path, name: str) -> Iterator[Path]:
    """Yield the files that importing ``name`` below ``base`` runs, were they there."""
    for part in [""] if not name else name.split("."):
        base = base / part if part else base
        yield base.with_suffix(".py")
        yield base / "__init__.py"


def _counts(path: Path) -> bool:
    hidden = any(part.startswith(".") or part in ("__pycache__", "node_modules") for part in path.parts)
    return not hidden and not path.name.startswith(_SKIPPED)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()
