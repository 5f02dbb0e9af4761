"""Slot: one source of agents over time, and how its content is told from what was loaded."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gateway.registry.discovery import hash_file, list_sources
from gateway.registry.entry import AgentEntry, Diagnostic
from gateway.registry.loading import Declaration, DropIn, LoadedGeneration


@dataclass(frozen=True, slots=True)
class Source:
    """A drop-in or declaration as found, with what already speaks against loading it."""

    value: DropIn | Declaration
    problem: Diagnostic | None = None


@dataclass(eq=False, slots=True)
class Slot:
    """One source over time: its serving generation, its last failure, and the content either was made from."""

    source: DropIn | Declaration
    hashes: dict[Path, str] = field(default_factory=dict)
    loaded: LoadedGeneration | None = None
    entries: tuple[AgentEntry, ...] = ()
    problems: tuple[Diagnostic, ...] = ()
    task: asyncio.Task[None] | None = None

    def rank(self) -> int:
        """Who is served when two want one id."""
        if isinstance(self.source, Declaration):
            return 0
        return 1 if self.entries else 2

    def rows(self) -> Iterable[AgentEntry]:
        """Return the rows of the registry: ready, stale, or one error."""
        if self.entries and self.problems:
            return [replace(e, status="stale", diagnostics=(*self.problems, *e.diagnostics)) for e in self.entries]
        if self.entries or not self.problems:
            return self.entries
        return (_error_row(self.source, self.problems),)

    def wants_retry(self, *, force: bool, paths: Collection[Path]) -> bool:
        """Whether a failed load may go better now although its files are the same."""
        if not self.problems or self.task is not None:
            return False
        missing = {item.module.partition(".")[0] for item in self.problems if item.module and item.code in _MISSING}
        return force or any(not missing.isdisjoint((*path.parts, path.stem)) for path in paths)


_MISSING = ("missing_module", "missing_package")


def hash_source(source: Source, before: Mapping[Path, str]) -> dict[Path, str]:
    """Hash the content that a source is made of; keys without a folder stand for what is not a file."""
    value = source.value
    if isinstance(value, Declaration):
        same = replace(value, line=0, created=0)
        hashes = {Path(f"#{value.id}"): hashlib.sha256(repr(same).encode()).hexdigest()}
        dropin = value.dropin
    else:
        hashes = {Path(f"#{value.id}"): _identity(value)}
        dropin = value
    if source.problem is not None:
        return {**hashes, Path("#problem"): source.problem.code}
    if dropin is not None:
        files = {*list_sources(dropin), *(path for path in before if path.is_absolute())}
        hashes.update((path, hash_file(path)) for path in files)
    return hashes


def is_concerned(source: Source, before: Mapping[Path, str], paths: Collection[Path]) -> bool:
    """Whether a change of one of ``paths`` may be a change of the source."""
    value = source.value
    if isinstance(value, Declaration) or (Path(f"#{value.id}") not in before):
        return True
    if before[Path(f"#{value.id}")] != _identity(value) or (Path("#problem") in before) != bool(source.problem):
        return True
    return any(path in before or path.is_relative_to(value.folder) for path in paths)


def _identity(value: DropIn) -> str:
    """Return what a drop-in is given by others than its files."""
    return f"{value.default_upstream} {value.default_model} {value.model_config}"


def content_hash(hashes: Mapping[Path, str]) -> str:
    """Return one hash over a generation's files."""
    text = "\n".join(f"{path} {digest}" for path, digest in sorted(hashes.items()))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _error_row(source: DropIn | Declaration, problems: tuple[Diagnostic, ...]) -> AgentEntry:
    is_yaml = isinstance(source, Declaration)
    return AgentEntry(
        id=source.id,
        namespace=source.namespace,
        name=source.slug,
        display_name=source.name if isinstance(source, Declaration) else source.slug,
        kind="declarative" if isinstance(source, Declaration) and source.dropin is None else "sdk",
        source="yaml" if is_yaml else "file",
        created=source.created if isinstance(source, Declaration) else _modified(source.file),
        executor=None,
        status="error",
        file=source.label,
        diagnostics=problems,
    )


def _modified(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0
