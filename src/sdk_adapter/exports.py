"""Which agents a drop-in module publishes, by what name, and what its ``__gateway__`` says about them.

The rule, first match wins: an explicit ``__agents__``; the names of ``GATEWAY_AGENT_EXPORTS`` in their order; the only
`Agent` of the module; the only one that no other hands to or uses as a tool; where all hand to each other, the one that
the file itself runs under ``if __name__ == "__main__"``. Anything else is a diagnostic with the candidates and the one
line that settles it.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import msgspec
from agents import Agent

from gateway.registry.entry import AgentOptions, Diagnostic
from gateway.registry.loading import DropIn, LoadFailed
from gateway.registry.registry import slugify
from sdk_adapter.diagnosis import diagnose, nearest
from sdk_adapter.instrument import reachable_agents


@dataclass(frozen=True, slots=True)
class Export:
    """One published value: an agent, or the factory of one.

    ``suffix`` is None for the one that has the drop-in's own name; the others are ``<folder>-<suffix>``.
    """

    attribute: str
    value: Any
    suffix: str | None = None

    @property
    def is_factory(self) -> bool:
        """Whether the value must be called to get the agent."""
        return not isinstance(self.value, Agent)


def find_exports(module: ModuleType, dropin: DropIn, names: tuple[str, ...]) -> tuple[Export, ...]:
    """Return what the module publishes, the one with the drop-in's own name first; raise `LoadFailed`."""
    outline = Outline(dropin)
    if dropin.attribute is not None:
        return (_named(module, dropin, dropin.attribute, outline),)
    explicit = getattr(module, "__agents__", None)
    if explicit is not None:
        return _explicit(module, dropin, explicit, names, outline)
    return _by_name(module, dropin, names, outline) or (_root(module, dropin, names, outline),)


def read_options(module: ModuleType, dropin: DropIn) -> tuple[AgentOptions, tuple[Diagnostic, ...]]:
    """Return the module's ``__gateway__`` as options, with warnings for unknown keys; raise `LoadFailed`.

    ``timeout`` is a second name of ``timeout_s``. ``acl`` and a non-empty ``tools`` are refused, because an author who
    writes them counts on them.
    """
    given = getattr(module, "__gateway__", None)
    if given is None:
        return AgentOptions(), ()
    outline = Outline(dropin)
    if not isinstance(given, Mapping):
        raise LoadFailed(
            diagnose(
                dropin,
                "invalid_options",
                f"__gateway__ is a {type(given).__name__}; it must be a dict.",
                '__gateway__ = {"description": "What the agent does."}',
                line=outline.line_of("__gateway__"),
            )
        )
    known = {item.name for item in fields(AgentOptions)}
    values: dict[str, Any] = {}
    warnings: list[Diagnostic] = []
    for key, value in given.items():
        name = "timeout_s" if key == "timeout" else str(key)
        if name in known:
            values[name] = value
        elif name in _REFUSED_OPTIONS and value:
            line = outline.line_of_option(name)
            raise LoadFailed(diagnose(dropin, "invalid_options", *_REFUSED_OPTIONS[name], line=line))
        elif name not in _REFUSED_OPTIONS:
            warnings.append(
                diagnose(
                    dropin,
                    "unknown_option",
                    f"__gateway__ has the unknown key '{name}'; it has no effect.",
                    f"{nearest(name, sorted(known))}Known keys: {', '.join(sorted(known))}.",
                    line=outline.line_of_option(name),
                    is_warning=True,
                )
            )
    return convert_options(values, dropin, outline.line_of_option), tuple(warnings)


def convert_options(values: Mapping[str, Any], dropin: DropIn, line_of: Callable[[str], int | None]) -> AgentOptions:
    """Check the types and ranges of options; raise `LoadFailed` naming the key."""
    for name, value in values.items():
        problem: str | None
        try:
            msgspec.convert({name: value}, type=AgentOptions)
        except msgspec.ValidationError as error:
            problem = str(error).partition(" - at ")[0].replace("`", "'")
        else:
            problem = _range_problem(name, value)
        if problem:
            raise LoadFailed(
                diagnose(
                    dropin,
                    "invalid_options",
                    f"__gateway__['{name}'] is {value!r:.80}: {problem}.",
                    f"Give '{name}' a value of the documented type, or leave it out.",
                    line=line_of(name),
                )
            )
    return msgspec.convert(dict(values), type=AgentOptions)


def call_factory(export: Export, dropin: DropIn) -> Any:
    """Call a factory and return what it returns (perhaps an awaitable).

    A factory with a required argument gets the build context: a read-only mapping with ``model_id``, ``namespace``,
    ``name`` and ``folder`` (the folder's path). Raises `LoadFailed` for a factory with more required arguments.
    """
    required = _required_parameters(export.value)
    if required is None or len(required) > 1:
        wanted = ", ".join(required or ("keyword-only arguments",))
        raise LoadFailed(
            diagnose(
                dropin,
                "factory_arguments",
                f"The factory '{export.attribute}' needs arguments that the gateway does not have: {wanted}.",
                f"Give them defaults: def {export.attribute}() or def {export.attribute}(context) is called.",
                line=Outline(dropin).line_of(export.attribute),
            )
        )
    context = MappingProxyType(
        {
            "model_id": dropin.id if export.suffix is None else f"{dropin.id}-{slugify(export.suffix)}",
            "namespace": dropin.namespace,
            "name": dropin.slug,
            "folder": str(dropin.folder),
        }
    )
    return export.value(context) if required else export.value()


def check_agent(value: Any, export: Export, dropin: DropIn) -> Agent[Any]:
    """Return ``value`` if it is an SDK agent that can serve chat; raise `LoadFailed` saying what it is instead."""
    if isinstance(value, Agent):
        return value
    raise LoadFailed(_wrong_type(value, export.attribute, dropin, Outline(dropin), came_from_factory=export.is_factory))


class Outline:
    """Where the top-level names of a drop-in's file stand; read from the source when first asked."""

    def __init__(self, dropin: DropIn) -> None:
        self._dropin = dropin
        self._body: list[ast.stmt] | None = None

    def line_of(self, name: str) -> int | None:
        """Return the line of the last top-level assignment or definition of ``name``."""
        found = None
        for node in self._statements():
            if name in _bound_names(node):
                found = node.lineno
        return found

    def line_of_text(self, text: str | None) -> int | None:
        """Return the line of a string literal."""
        for node in self._statements():
            for item in ast.walk(node):
                if text is not None and isinstance(item, ast.Constant) and item.value == text:
                    return item.lineno
        return None

    def line_of_option(self, key: str) -> int | None:
        """Return the line of a key of the ``__gateway__`` literal."""
        for node in self._statements():
            if "__gateway__" in _bound_names(node) and isinstance(node, ast.Assign | ast.AnnAssign):
                for item in getattr(node.value, "keys", ()):
                    if isinstance(item, ast.Constant) and item.value in (key, key.removesuffix("_s")):
                        return item.lineno
        return self.line_of("__gateway__")

    def factories(self) -> list[str]:
        """Return the names of functions that look like factories of agents."""
        functions = (n for n in self._statements() if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        return [n.name for n in functions if "agent" in n.name.lower() or "Agent" in ast.unparse(n.returns or n.args)]

    def hides_agents(self) -> bool:
        """Whether an ``Agent(…)`` is made inside a function."""
        functions = (n for n in self._statements() if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        calls = (n for f in functions for n in ast.walk(f) if isinstance(n, ast.Call))
        return any(isinstance(n.func, ast.Name) and n.func.id == "Agent" for n in calls)

    def started_names(self) -> set[str]:
        """Return the names used by what the file itself does under ``if __name__ == "__main__"``."""
        functions = {n.name: n for n in self._statements() if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        names: set[str] = set()
        for node in self._statements():
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                names |= _used_names(node)
        for name in [name for name in names if name in functions]:
            names |= _used_names(functions[name])
        return names

    def _statements(self) -> list[ast.stmt]:
        if self._body is None:
            try:
                self._body = ast.parse(self._dropin.file.read_bytes()).body
            except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                self._body = []
        return self._body


_REFUSED_OPTIONS = {
    "acl": (
        "__gateway__['acl'] is not served: who may use an agent is decided by keys, not by the agent's file.",
        "Remove it, and set allow_agents of the keys in security.yaml.",
    ),
    "tools": (
        "__gateway__['tools'] is not served: an agent in Python names its tools itself.",
        "Remove it, and write Agent(tools=[gateway_tool('name'), ...]), from sdk_adapter.gateway_tools.",
    ),
}


def _explicit(
    module: ModuleType, dropin: DropIn, given: Any, names: tuple[str, ...], outline: Outline
) -> tuple[Export, ...]:
    line = outline.line_of("__agents__")
    if isinstance(given, Mapping):
        pairs = [(str(key), value) for key, value in given.items()]
    elif isinstance(given, list | tuple):
        pairs = [(item, item) if isinstance(item, str) else (_global_name(module, item), item) for item in given]
    else:
        pairs = []
    if not pairs:
        what = "is empty" if isinstance(given, list | tuple | Mapping) else f"is a {type(given).__name__}"
        fix = '__agents__ = ["agent"]'
        raise LoadFailed(diagnose(dropin, "no_export", f"__agents__ {what}; it must list agents.", fix, line=line))
    exports = []
    for name, value in pairs:
        export = _named(module, dropin, value, outline) if isinstance(value, str) else Export(name, value)
        if not isinstance(export.value, Agent) and not _is_function(export.value):
            raise LoadFailed(_wrong_type(export.value, name, dropin, outline))
        exports.append(replace(export, suffix=name))
    order = {name: index for index, name in enumerate((dropin.slug, *names))}
    first = min(exports, key=lambda export: order.get(str(export.suffix), len(order)))
    return (replace(first, suffix=None), *(export for export in exports if export is not first))


def _by_name(module: ModuleType, dropin: DropIn, names: tuple[str, ...], outline: Outline) -> tuple[Export, ...]:
    """Return the exports found by name; extra agents under other names of the list count when nothing leads to them."""
    found = [(name, vars(module)[name]) for name in names if vars(module).get(name) is not None]
    agents = [(name, value) for name, value in found if isinstance(value, Agent)]
    if not agents:
        if found and found[0][0] == names[0] and not _is_function(found[0][1]):
            raise LoadFailed(_wrong_type(found[0][1], found[0][0], dropin, outline))
        return tuple(Export(name, value) for name, value in found if _is_function(value))[:1]
    known = {*map(id, reachable_agents(agents[0][1]))}
    exports = [Export(*agents[0])]
    for name, value in agents[1:]:
        if id(value) not in known:
            known |= set(map(id, reachable_agents(value)))
            exports.append(Export(name, value, suffix=name))
    return tuple(exports)


def _root(module: ModuleType, dropin: DropIn, names: tuple[str, ...], outline: Outline) -> Export:
    """Return the only agent of the module, or the only one that no other leads to."""
    candidates: dict[int, tuple[str, Agent[Any]]] = {}
    for name, value in vars(module).items():
        if isinstance(value, Agent):
            candidates.setdefault(id(value), (name, value))
    led_to = {id(child) for _, agent in candidates.values() for child in reachable_agents(agent)[1:]}
    roots = [Export(name, agent) for name, agent in candidates.values() if id(agent) not in led_to]
    if len(candidates) == 1:
        return Export(*next(iter(candidates.values())))
    if len(roots) == 1:
        return roots[0]
    started = outline.started_names() & {name for name, _ in candidates.values()}
    if len(started) == 1:
        name = started.pop()
        return Export(name, vars(module)[name])
    if candidates:
        choices = [export.attribute for export in roots] or [name for name, _ in candidates.values()]
        raise LoadFailed(
            diagnose(
                dropin,
                "ambiguous_export",
                f"The file has several agents and nothing says which one is meant: {', '.join(choices)}.",
                f'Add one line: __agents__ = ["{choices[0]}"] (list several to publish several), or name one '
                f"'{names[0] if names else 'agent'}'.",
                line=outline.line_of(choices[0]),
            )
        )
    raise LoadFailed(_no_export(module, dropin, names, outline))


def _no_export(module: ModuleType, dropin: DropIn, names: tuple[str, ...], outline: Outline) -> Diagnostic:
    for name in names:
        value = vars(module).get(name)
        if value is not None and not _is_function(value):
            return _wrong_type(value, name, dropin, outline)
    public = [name for name in vars(module) if not name.startswith("_") and not inspect.ismodule(vars(module)[name])]
    for name in public:
        if _is_realtime(vars(module)[name]):
            return _wrong_type(vars(module)[name], name, dropin, outline)
    own = [name for name in public if outline.line_of(name) is not None]
    factories = [name for name in outline.factories() if name in own]
    near = nearest(names[0] if names else "agent", own)
    found = f" Found: {', '.join(own[:12])}." if own else " The file defines no public names."
    if factories:
        fix = f"{near}To publish what {factories[0]}() builds: agent = {factories[0]}(...)"
        line = outline.line_of(factories[0])
    elif outline.hides_agents():
        fix = (
            f"{near}An agent made inside a function is not seen: make it at the top of the file, as agent = Agent(...)."
        )
        line = None
    else:
        fix = f'{near}Add: agent = Agent(name="{dropin.slug}", instructions="...")'
        line = outline.line_of(near.split("'")[1]) if near else None
    looked = ", ".join(names)
    return diagnose(dropin, "no_export", f"No agent in the file; looked for: {looked}.{found}", fix, line=line)


def _named(module: ModuleType, dropin: DropIn, name: str, outline: Outline) -> Export:
    value = getattr(module, name, None)
    if value is None:
        own = [key for key in vars(module) if not key.startswith("_")]
        raise LoadFailed(
            diagnose(
                dropin,
                "no_export",
                f"The module has no '{name}'.",
                f"{nearest(name, own)}Name an agent or a factory that stands at the top of the file.",
                line=outline.line_of("__agents__"),
            )
        )
    if not isinstance(value, Agent) and not _is_function(value):
        raise LoadFailed(_wrong_type(value, name, dropin, outline))
    return Export(name, value)


def _wrong_type(
    value: Any, name: str, dropin: DropIn, outline: Outline, *, came_from_factory: bool = False
) -> Diagnostic:
    subject = f"What '{name}' returned" if came_from_factory else f"'{name}'"
    kind = type(value).__name__
    if isinstance(value, type):
        what, fix = f"is the class {value.__name__}, not an agent", f"Make one: {name} = {value.__name__}(...)"
    elif _is_realtime(value):
        what = "is a RealtimeAgent, which speaks audio over a session and is not a chat model"
        fix = "Publish an Agent of the Agents SDK; realtime agents are not served here."
    elif hasattr(value, "run") or hasattr(value, "run_sync"):
        what = f"is a {kind} with a run method, not an Agent of the OpenAI Agents SDK"
        fix = "Wrap it as a tool of an Agent: @function_tool around its run method."
    elif inspect.isawaitable(value):
        what, fix = "is a coroutine that was never awaited", f"Publish the function itself: async def {name}()"
    else:
        what, fix = f"is a {kind}, not an agent", f'{name} = Agent(name="{dropin.slug}", instructions="...")'
    if came_from_factory and not isinstance(value, type):
        fix = "Return an Agent of the Agents SDK from it."
    return diagnose(dropin, "wrong_type", f"{subject} {what}.", fix, line=outline.line_of(name))


def _required_parameters(function: Any) -> list[str] | None:
    """Return the required positional parameters; None if a keyword-only one is required."""
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty or parameter.kind in (_VAR_POSITIONAL, _VAR_KEYWORD):
            continue
        if parameter.kind is _KEYWORD_ONLY:
            return None
        required.append(parameter.name)
    return required


_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


_POSITIVE = frozenset(
    {"max_turns", "max_completion_tokens", "timeout_s", "max_model_calls", "max_total_tokens", "max_cost_usd"}
)


def _range_problem(name: str, value: Any) -> str | None:
    if name in _POSITIVE and value is not None and not 0 < value < math.inf:
        return "it must be greater than 0"
    if name in ("max_tool_hops", "max_depth", "max_tool_calls") and value is not None and value < 0:
        return "it must be 0 or more"
    if name == "namespace" and value is not None and slugify(value) != value:
        return f"write it as '{slugify(value) or 'name'}' (lower-case letters, digits and '-')"
    return None


def _global_name(module: ModuleType, value: Any) -> str:
    for name, candidate in vars(module).items():
        if candidate is value and not name.startswith("__"):
            return name
    return slugify(str(getattr(value, "name", ""))) or "agent"


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType) or type(value).__name__ == "partial"


def _is_realtime(value: Any) -> bool:
    return any(base.__name__ == "RealtimeAgent" for base in type(value).__mro__)


def _used_names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _bound_names(node: ast.stmt) -> Iterable[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return ()
