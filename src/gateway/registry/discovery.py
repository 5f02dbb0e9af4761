"""Discovery: walk the drop-in folders and say which files should hold an agent. Executes nothing."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.registry.entry import Diagnostic
from gateway.registry.loading import DropIn
from gateway.registry.registry import slugify

MAX_SOURCE_BYTES = 512 * 1024
"""The largest source file that is compiled: more would hold the event loop for too long."""

_MAX_DEPTH = 12
_NOT_WALKED = frozenset({"__pycache__", "node_modules", "site-packages"})
_NEVER_AGENTS = ("_", ".", "test_", "conftest")


@dataclass(frozen=True, slots=True)
class Discovered:
    """A drop-in with the reason, found before looking inside, why it must not be loaded."""

    dropin: DropIn
    problem: Diagnostic | None = None


def find_roots(settings: Settings) -> tuple[Path, ...]:
    """Return the drop-in folders in order of precedence, resolved; the first need not exist yet.

    Raises `ConfigError` for a package that cannot be found, for an extra folder that does not exist, and for a
    folder with an ``__init__.py`` in it.
    """
    if settings.agent_package is not None:
        roots = [(_package_folder(settings.agent_package, "GATEWAY_AGENT_DISCOVERY_PACKAGE"), True)]
    else:
        roots = [(settings.agents_root(), False)]
    for text in settings.agent_extra_paths:
        extra = Path(text).expanduser()
        if not extra.is_dir():
            raise ConfigError(f"GATEWAY_AGENT_DISCOVERY_EXTRA_PATHS names {text}, which is not a folder.")
        roots.append((extra, False))
    if settings.agent_extra_package is not None:
        roots.append((_package_folder(settings.agent_extra_package, "GATEWAY_AGENT_DISCOVERY_EXTRA_PACKAGE"), True))
    for path, is_package in roots:
        if not is_package or path.name == "agents":
            refuse_init_py(path)
    return tuple(dict.fromkeys(path.resolve() for path, _ in roots))


def refuse_init_py(root: Path) -> None:
    """Raise `ConfigError` if the drop-in folder was made a package: it would hide the SDK, whose name is ``agents``."""
    if (root / "__init__.py").exists():
        raise ConfigError(
            f"{root.name}/__init__.py makes the drop-in folder a Python package that hides the Agents SDK "
            "(its import name is 'agents'): delete that file."
        )


def discover(roots: Iterable[Path], default_namespace: str) -> list[Discovered]:
    """Return every drop-in below ``roots``: ``agent.py`` at any depth, and single files directly in a root."""
    found: list[Discovered] = []
    for root in roots:
        found.extend(_discover_root(root, default_namespace))
    return found


def list_sources(dropin: DropIn) -> Iterator[Path]:
    """Yield the files whose content decides whether a drop-in has changed, before it was ever loaded.

    All Python files of its folder (not those of another drop-in further down) and ``requirements.txt``; a single
    file stands for itself.
    """
    if dropin.is_single_file or dropin.module is not None:
        yield dropin.file
        return
    requirements = dropin.folder / "requirements.txt"
    if requirements.is_file():
        yield requirements
    for level in _walk(dropin.folder):
        if level.depth and "agent.py" in level.files:
            continue
        for name in level.files:
            if name.endswith(".py"):
                yield Path(level.folder, name)


def fingerprint(dropin: DropIn, tracked: Iterable[Path]) -> str:
    """Return one hash over the content of a drop-in's sources and of the other files it depends on."""
    digest = hashlib.sha256()
    for path in sorted({*list_sources(dropin), *tracked}):
        digest.update(f"{path}\0{hash_file(path)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, or a word for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def escapes(path: Path, root: Path) -> bool:
    """Whether ``path`` leads out of ``root`` through a symbolic link (or leads nowhere)."""
    try:
        return not path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return True


def name_spellings(dropin: DropIn) -> tuple[str, ...]:
    """Return the names by which a `ModulePolicy` may speak of a drop-in."""
    if dropin.module is not None:
        return (dropin.module, dropin.id)
    dotted = dropin.label.removesuffix(".py").replace("/", ".")
    short = (dotted.removesuffix(".agent"),) if dotted.endswith(".agent") else ()
    return (f"{dropin.root.name}.{dotted}", dotted, *short, dropin.label, dropin.id)


def module_folder(name: str, path: Iterable[str] | None = None) -> tuple[Path, bool] | None:
    """Find a module's file without importing it or its parents; the flag says whether it is a package."""
    search = list(sys.path if path is None else path)
    spec = None
    parts = name.split(".")
    for index in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: index + 1]), search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or ())
    if spec is None or (spec.origin is None and not search):
        return None
    return Path(spec.origin or search[0]), spec.submodule_search_locations is not None


def _package_folder(name: str, variable: str) -> Path:
    found = module_folder(name)
    if found is None or not found[1]:
        raise ConfigError(f"{variable}={name!r} is not an importable package; write its dotted name.")
    return found[0].parent if found[0].name == "__init__.py" else found[0]


def _discover_root(root: Path, default_namespace: str) -> Iterator[Discovered]:
    for level in _walk(root):
        folder = Path(level.folder)
        if not level.depth:
            for name, is_link in level.files.items():
                if name.endswith(".py") and not name.startswith(_NEVER_AGENTS):
                    yield _judge(root, folder, root / name, (name[:-3],), default_namespace, is_link)
        elif "agent.py" in level.files:
            parts = folder.relative_to(root).parts
            yield _judge(root, folder, folder / "agent.py", parts, default_namespace, level.files["agent.py"])
        for name in level.escaping:
            link = folder / name
            if (link / "agent.py").exists():
                yield _judge(root, link, link / "agent.py", link.relative_to(root).parts, default_namespace, True)


def _judge(
    root: Path, folder: Path, file: Path, parts: tuple[str, ...], default_namespace: str, is_link: bool
) -> Discovered:
    label = file.relative_to(root).as_posix()
    namespace = slugify(parts[0]) if len(parts) > 1 else default_namespace
    slug = slugify(parts[-1])
    dropin = DropIn(namespace or "-", slug or "-", root, folder, file, label)
    if not namespace or not slug:
        problem = Diagnostic(
            kind="validation",
            code="invalid_name",
            message="No model name can be made of the folder's name.",
            fix="Give the folder a name with letters a-z or digits.",
            file=label,
        )
        return Discovered(dropin, problem)
    if is_link and escapes(file, root):
        problem = Diagnostic(
            kind="security",
            code="path_escapes_root",
            message="A symbolic link leads out of the drop-in folder (or nowhere), so nothing behind it is loaded.",
            fix="Copy the files into the drop-in folder, or add theirs to GATEWAY_AGENT_DISCOVERY_EXTRA_PATHS.",
            file=label,
        )
        return Discovered(dropin, problem)
    return Discovered(dropin)


@dataclass(frozen=True, slots=True)
class _Level:
    """One folder of a walk: its files (name → is a link) and the linked folders that lead out of the root."""

    folder: str
    depth: int
    files: Mapping[str, bool]
    escaping: tuple[str, ...]


def _walk(root: Path) -> Iterator[_Level]:
    """Yield every folder that may hold sources, in a stable order.

    Of links to folders inside the root, only those that lead to a hidden one are followed (a mounted ConfigMap keeps
    its files in ``..data``): the others would find everything twice.
    """
    linked: set[str] = set()
    stack = [(str(root), 0)]
    while stack:
        folder, depth = stack.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            continue
        files: dict[str, bool] = {}
        folders: list[str] = []
        escaping: list[str] = []
        for entry in entries:
            if not _is_dir(entry):
                files[entry.name] = entry.is_symlink()
            elif entry.name.startswith(".") or entry.name in _NOT_WALKED:
                continue
            elif not entry.is_symlink():
                folders.append(entry.path)
            elif escapes(Path(entry.path), root):
                escaping.append(entry.name)
            elif _is_hidden(real := os.path.realpath(entry.path), root) and real not in linked:
                linked.add(real)
                folders.append(entry.path)
        if "pyvenv.cfg" in files:
            continue
        yield _Level(folder, depth, files, tuple(escaping))
        if depth < _MAX_DEPTH:
            stack.extend((path, depth + 1) for path in reversed(folders))


def _is_hidden(path: str, root: Path) -> bool:
    return any(part.startswith(".") for part in Path(path).relative_to(root).parts)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
