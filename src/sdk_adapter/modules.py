"""Generation: one private copy of a drop-in's modules, compiled from source under a package name of its own.

Inside a generation, plain and relative imports of the drop-in's own files, and of helper files that lie outside its
folder but neither in the standard library nor in site-packages, reach private copies; everything else is the process's.
The hook is the ``__import__`` of the modules' own builtins, so that nothing outside a generation ever sees it.
"""

from __future__ import annotations

import ast
import builtins
import gc
import hashlib
import importlib
import linecache
import logging
import os
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

from gateway.registry.discovery import MAX_SOURCE_BYTES, escapes, name_spellings
from gateway.registry.loading import DropIn
from gateway.registry.policy import ModulePolicy, Violation, iter_imports
from sdk_adapter.importing import RunAtImport, stopped_line

_SHARED = frozenset({"agents", "api", "gateway", "gateway_cli", "sdk_adapter", "__main__"})
"""The SDK's and our own top-level names: one copy in the process, whatever lies in a drop-in's folder."""

_OUTSIDE = "__outside__"
"""The sub-package under which helper files from outside the folder are copied."""


class ModuleBlocked(ImportError):
    """The module policy refuses a file; nothing of it has run."""

    def __init__(self, path: Path, violation: Violation) -> None:
        super().__init__(violation.message)
        self.file = path
        self.violation = violation


class SourceRefused(ImportError):
    """A source file cannot be loaded: too large, or a link that leads out of the drop-in folder."""

    def __init__(self, path: Path, code: str, message: str, fix: str) -> None:
        super().__init__(message)
        self.file, self.code, self.message, self.fix = path, code, message, fix


class SourceChanged(ImportError):
    """A file is not what the pre-flight saw: it was saved in between, and the load starts again."""


class DropInFinder(MetaPathFinder):
    """Finds the modules of living generations, and nothing else, on ``sys.meta_path``."""

    def __init__(self) -> None:
        self.generations: dict[str, Generation] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        generation = self.generations.get(fullname.partition(".")[0])
        return generation.find_spec(fullname, path) if generation is not None else None

    @contextmanager
    def installed(self) -> Iterator[DropInFinder]:
        """Stand first on ``sys.meta_path`` for the duration of the block."""
        sys.meta_path.insert(0, self)
        try:
            yield self
        finally:
            sys.meta_path.remove(self)


class Generation:
    """The modules of one load. ``files`` holds what was read so far, with its SHA-256.

    ``stops`` are the lines at which files began to run an agent: they were executed up to there.

    ``expected`` is what the pre-flight read: a file that differs raises `SourceChanged`; one that the pre-flight did
    not see is judged by ``policy`` before it runs.
    """

    def __init__(
        self,
        dropin: DropIn,
        number: int,
        finder: DropInFinder,
        policy: ModulePolicy,
        expected: Mapping[Path, str] | None = None,
    ) -> None:
        self.dropin = dropin
        self.package = f"_dropin_{number}_{re.sub(r'[^a-z0-9]+', '_', dropin.id)}"
        self.files: dict[Path, str] = {}
        self.shadowed: dict[str, str] = {}
        self.stops: dict[Path, int] = {}
        self._finder = finder
        self.policy = policy
        self._expected = expected
        self._outside: dict[str, ModuleSpec] = {}
        self._private: dict[str, str | None] = {}
        self._builtins = {**builtins.__dict__, "__import__": self._import}
        self._real_import: Callable[..., ModuleType] = builtins.__import__
        finder.generations[self.package] = self

    @property
    def entry_name(self) -> str:
        """The synthetic name of the module that holds the exports."""
        if self.dropin.module is not None:
            return self._resolve(self.dropin.module) or self.dropin.module
        return f"{self.package}.{self.dropin.file.stem}"

    def import_entry(self) -> ModuleType:
        """Import the drop-in's module, running its code; raises whatever the code raises."""
        importlib.invalidate_caches()
        before = list(sys.path)
        try:
            return importlib.import_module(self.entry_name)
        finally:
            _drop_repeated(before)

    def judge(self, policy: ModulePolicy) -> tuple[Path, Violation] | None:
        """Judge the drop-in and every file it can reach by a static import; runs nothing.

        Files that do not parse are left to the import, which says so with line and cause.
        """
        named = policy.judge_name(self.dropin.namespace, name_spellings(self.dropin))
        if named is not None:
            return self.dropin.file, named
        queue, seen = [self.dropin.file], {self.dropin.file}
        if not self.dropin.is_single_file and self.dropin.module is None:
            siblings = self.dropin.folder.glob("*.py")
            queue += sorted(
                p for p in siblings if p != self.dropin.file and not p.name.startswith(("test_", "conftest"))
            )
        while queue:
            path = queue.pop()
            try:
                tree = ast.parse(self._read(path))
            except (SyntaxError, ValueError, RecursionError, MemoryError, OSError, ImportError):
                continue
            violation = policy.judge_source(self.dropin.namespace, tree)
            if violation is not None:
                return path, violation
            for target in self._targets(path, tree):
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        return None

    def release(self) -> None:
        """Forget the modules, so that they go when nothing uses them any more."""
        self._finder.generations.pop(self.package, None)
        prefix = f"{self.package}."
        for name in [name for name in sys.modules if name == self.package or name.startswith(prefix)]:
            del sys.modules[name]
        loggers = logging.root.manager.loggerDict
        for name in [name for name in loggers if name == self.package or name.startswith(prefix)]:
            del loggers[name]
        for path in self.files:
            linecache.cache.pop(str(path), None)
        self._private.clear()
        self._outside.clear()

    def owns(self, filename: str) -> bool:
        """Whether a frame's file belongs to this generation."""
        return Path(filename) in self.files

    def find_spec(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        """Find one of this generation's modules."""
        parts = fullname.split(".")[1:]
        if not parts:
            folder = self.dropin.folder
            init = folder / "__init__.py"
            if self.dropin.module is None and not self.dropin.is_single_file and init.is_file():
                return self._spec(fullname, init, [str(folder)])
            return _namespace(fullname, [] if self.dropin.module is not None else [str(folder)])
        if parts == [_OUTSIDE]:
            return _namespace(fullname, [])
        if parts[0] == _OUTSIDE and len(parts) == 2:
            return self._copy(fullname, self._outside.get(parts[1]))
        if len(parts) == 1 and self.dropin.module is None and parts[0] == self.dropin.file.stem:
            return self._spec(fullname, self.dropin.file, None)
        return self._locate(fullname, parts[-1], path or ())

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        private = self._resolve(name) if level == 0 else None
        if private is None:
            return self._real_import(name, globals, locals, fromlist, level)
        if fromlist:
            return self._real_import(private, globals, locals, fromlist, 0)
        importlib.import_module(private)
        return sys.modules[private.removesuffix(name) + name.partition(".")[0]]

    def _resolve(self, name: str) -> str | None:
        """Return the private name that ``import name`` means in this generation; None for the process's own module."""
        top, dot, rest = name.partition(".")
        if top not in self._private:
            self._private[top] = self._resolve_top(top)
        private = self._private[top]
        return None if private is None else f"{private}{dot}{rest}"

    def _resolve_top(self, top: str) -> str | None:
        if top in _SHARED or top in sys.builtin_module_names or top.startswith("_dropin_"):
            return None
        sibling = self._sibling(top)
        if top in sys.stdlib_module_names:
            if sibling is not None:
                self.shadowed[top] = "the standard library"
            return None
        installed = PathFinder.find_spec(top, [path for path in sys.path if _is_library(path)])
        if installed is not None and (installed.loader is not None or sibling is None):
            if sibling is not None:
                self.shadowed[top] = "an installed package"
            return None
        if sibling is not None:
            return f"{self.package}.{top}"
        spec = PathFinder.find_spec(top, self._outside_path())
        if spec is None or not _has_sources(spec):
            return None
        self._outside[top] = spec
        return f"{self.package}.{_OUTSIDE}.{top}"

    def _sibling(self, top: str) -> Path | None:
        if self.dropin.module is not None:
            return None
        folder = self.dropin.folder
        if (folder / f"{top}.py").is_file():
            return folder / f"{top}.py"
        if (folder / top / "__init__.py").is_file():
            return folder / top / "__init__.py"
        return folder / top if (folder / top).is_dir() and any((folder / top).glob("*.py")) else None

    def _outside_path(self) -> list[str]:
        """Where helper files may lie: the folders between the drop-in and its root, then the project's ``sys.path``."""
        between: list[str] = []
        if self.dropin.module is None:
            folder = self.dropin.folder
            while folder != self.dropin.root and self.dropin.root in folder.parents:
                folder = folder.parent
                between.append(str(folder))
        return [*between, *(path for path in sys.path if not _is_library(path))]

    def _targets(self, importer: Path, tree: ast.AST) -> Iterator[Path]:
        """Yield the private files that the imports of ``tree`` reach (the module and, for ``from``, its submodules)."""
        for names, _ in iter_imports(tree):
            for name in names:
                private = self._resolve(name)
                if private is None:
                    continue
                parts = private.split(".")[1:]
                if parts[0] == _OUTSIDE:
                    search: list[str] | None = None
                    spec = self._outside.get(parts[1])
                    parts = parts[2:]
                    yield from _origin(spec)
                    search = list(spec.submodule_search_locations or ()) if spec is not None else []
                else:
                    search = [str(self.dropin.folder)]
                yield from _descend(parts, search)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = importer.parent
                for _ in range(node.level - 1):
                    folder = folder.parent
                head = node.module.split(".") if node.module else []
                for alias in node.names:
                    yield from _descend([*head, alias.name], [str(folder)])

    def _copy(self, fullname: str, spec: ModuleSpec | None) -> ModuleSpec | None:
        if spec is None:
            return None
        locations = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
        if spec.origin is None or spec.loader is None:
            return _namespace(fullname, locations or [])
        return self._spec(fullname, Path(spec.origin), locations)

    def _locate(self, fullname: str, name: str, search: Sequence[str]) -> ModuleSpec | None:
        """Find ``name`` in ``search`` as Python does: package, module, then a plain folder."""
        for folder in search:
            base = Path(folder, name)
            if (base / "__init__.py").is_file():
                return self._spec(fullname, base / "__init__.py", [str(base)])
            module = Path(folder, f"{name}.py")
            if module.is_file():
                return self._spec(fullname, module, None)
        folders = [str(Path(folder, name)) for folder in search if Path(folder, name).is_dir()]
        return _namespace(fullname, folders) if folders else None

    def _spec(self, fullname: str, path: Path, locations: list[str] | None) -> ModuleSpec | None:
        loader = _SourceLoader(self, fullname, str(path))
        return spec_from_file_location(fullname, path, loader=loader, submodule_search_locations=locations)

    def _read(self, path: Path) -> bytes:
        """Read a source file, keep its hash, and refuse what must not be loaded."""
        if path.is_relative_to(self.dropin.root) and escapes(path, self.dropin.root):
            raise SourceRefused(
                path,
                "path_escapes_root",
                "A symbolic link leads out of the drop-in folder, so the file behind it is not loaded.",
                "Copy the file into the drop-in's folder.",
            )
        with path.open("rb") as file:
            data = file.read(MAX_SOURCE_BYTES + 1)
        if len(data) > MAX_SOURCE_BYTES:
            raise SourceRefused(
                path,
                "file_too_large",
                f"The file is larger than {MAX_SOURCE_BYTES // 1024} KiB, the most that is compiled.",
                "Move data out of the source into a file that is read at run time, or split the module.",
            )
        self.files[path] = hashlib.sha256(data).hexdigest()
        return data

    def code_of(self, path: Path) -> CodeType:
        """Compile a file from its text; it has been judged, here or by the pre-flight."""
        data = self._read(path)
        expected = None if self._expected is None else self._expected.get(path)
        if expected is None:
            violation = self.policy.judge_source(self.dropin.namespace, ast.parse(data, str(path)))
            if violation is not None:
                raise ModuleBlocked(path, violation)
        elif expected != self.files[path]:
            raise SourceChanged(f"{path.name} was saved while it was being loaded")
        code: CodeType = compile(data, str(path), "exec", dont_inherit=True)
        return code

    def prepare(self, module: ModuleType) -> None:
        """Give a module the builtins whose ``__import__`` knows this generation."""
        module.__dict__["__builtins__"] = self._builtins


class _SourceLoader(SourceFileLoader):
    """Loads one file of a generation from its text; a ``.pyc`` is neither read nor written."""

    def __init__(self, generation: Generation, fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self._generation = generation

    def get_code(self, fullname: str) -> CodeType | None:
        """See `importlib.abc.InspectLoader.get_code`."""
        return self._generation.code_of(Path(self.path))

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader.exec_module`."""
        self._generation.prepare(module)
        try:
            super().exec_module(module)
        except RunAtImport as stop:
            self._generation.stops[Path(self.path)] = stopped_line(stop, self.path)


def collect_garbage() -> None:
    """Free what released generations left in reference cycles."""
    gc.collect()


def _drop_repeated(before: list[str]) -> None:
    """Remove what an import put on ``sys.path`` a second time, so that reloads do not make it longer and longer."""
    if sys.path != before:
        sys.path[:] = dict.fromkeys(sys.path)


def _namespace(fullname: str, locations: list[str]) -> ModuleSpec:
    spec = ModuleSpec(fullname, None, is_package=True)
    spec.submodule_search_locations = locations
    return spec


def _has_sources(spec: ModuleSpec) -> bool:
    if spec.origin is not None and spec.loader is not None:
        return spec.origin.endswith(".py")
    return bool(spec.submodule_search_locations)


def _origin(spec: ModuleSpec | None) -> Iterator[Path]:
    if spec is not None and spec.loader is not None and spec.origin is not None:
        yield Path(spec.origin)


def _descend(parts: list[str], search: list[str]) -> Iterator[Path]:
    """Yield the files met on the way down a dotted name, as far as it leads to modules."""
    for part in parts:
        for folder in search:
            package, module = Path(folder, part, "__init__.py"), Path(folder, f"{part}.py")
            if package.is_file():
                yield package
            elif module.is_file():
                yield module
            elif not package.parent.is_dir():
                continue
            search = [str(package.parent)]
            break
        else:
            return


@lru_cache(maxsize=1)
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.update(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        folders.add(site.getusersitepackages())
    return tuple(os.path.realpath(folder) for folder in folders)


@lru_cache(maxsize=256)
def _is_library(path: str) -> bool:
    """Whether a ``sys.path`` entry is the standard library or holds installed distributions."""
    if not path:
        return False
    real = os.path.realpath(path)
    return real.endswith((".zip", "lib-dynload", "site-packages", "dist-packages")) or real in _library_folders()
