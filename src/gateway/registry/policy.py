"""ModulePolicy: which drop-ins may load and what they may import, judged from path and source alone.

It is a lint: it stops the honest mistake and the copied snippet before a line of them runs. It does not contain hostile
Python, which can reach any module by other means; whoever may write to the agents folder may run code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule that says no. ``line`` is None where the drop-in's own name is what the rule is about."""

    message: str
    fix: str
    line: int | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True)
class ModuleRules:
    """Module patterns of one namespace."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModulePolicy:
    """fnmatch patterns over module names; deny wins.

    ``allow`` and ``deny`` judge a drop-in by its names: dotted path (``agents.labs.Research.agent``,
    ``labs.Research.agent``, ``labs.Research``), file path (``labs/Research/agent.py``) and model id
    (``labs/research``). ``deny`` judges its imports as well: the pattern ``subprocess`` stops the module and
    everything in it, ``os.exec*`` stops ``from os import execv``. An empty ``allow`` allows all. A namespace's own
    ``allow`` takes the place of the general one there; its ``deny`` adds to it.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    namespaces: Mapping[str, ModuleRules] = field(default_factory=dict)

    def judge_name(self, namespace: str, names: Iterable[str]) -> Violation | None:
        """Judge a drop-in by its own names."""
        names = tuple(names)
        allow, deny = self._rules(namespace)
        for pattern in deny:
            if any(_matches(name, pattern) for name in names):
                return Violation(
                    f"The module denylist blocks this drop-in (rule '{pattern}').", _FIX_DENY.format(pattern=pattern)
                )
        if allow and not any(_matches(name, pattern) for name in names for pattern in allow):
            return Violation(
                f"The module allowlist does not name this drop-in (rules: {', '.join(map(repr, allow))}).",
                f"Add a pattern that matches '{names[0]}' to dropin_module_allowlist in security.yaml or to "
                "GATEWAY_AGENT_DISCOVERY_ALLOWLIST, or leave the drop-in out.",
            )
        return None

    def judge_source(self, namespace: str, tree: ast.AST) -> Violation | None:
        """Judge the imports of one file: ``import x``, ``from x import y``, ``__import__``, ``import_module``."""
        deny = self._rules(namespace)[1]
        if not deny:
            return None
        for names, line in iter_imports(tree):
            for pattern in deny:
                if any(_matches(name, pattern) for name in names):
                    return Violation(
                        f"Importing '{names[0]}' is blocked by the module denylist (rule '{pattern}').",
                        _FIX_DENY.format(pattern=pattern),
                        line,
                        names[0],
                    )
        return None

    def _rules(self, namespace: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        own = self.namespaces.get(namespace, ModuleRules())
        return own.allow or self.allow, (*self.deny, *own.deny)


def iter_imports(tree: ast.AST) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the absolute names that each import of ``tree`` may reach, and its line.

    ``from x import y`` yields ``x`` and ``x.y``; a call of ``__import__`` or ``import_module`` (under any name it was
    imported as) counts when its first argument is a literal, or literals added up.
    """
    callables = {"__import__", "import_module"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("importlib", "builtins"):
            callables |= {a.asname or a.name for a in node.names if a.name in ("import_module", "__import__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.name,), node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)), node.lineno
        elif isinstance(node, ast.Call) and _called_name(node) in callables:
            arguments = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "name")]
            name = _literal(arguments[0]) if arguments else None
            if name and not name.startswith("."):
                yield (name,), node.lineno


_FIX_DENY = (
    "Remove the import, or the rule '{pattern}' from dropin_module_denylist in security.yaml or from "
    "GATEWAY_AGENT_DISCOVERY_DENYLIST."
)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _called_name(node: ast.Call) -> str | None:
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else None


def _literal(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal(node.left), _literal(node.right)
        return None if left is None or right is None else left + right
    return None
