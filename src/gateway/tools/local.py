"""Tools that are Python callables of the operator's: sync ones in threads, async ones on the event loop.

Two signatures are understood: ``f(*, arguments: dict, context)``, and an ordinary function whose parameters are the
tool's arguments, from whose type hints the schema is made; it may ask for ``context``, too.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
import threading
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from gateway.caller_context import NOTHING, CallerContext
from gateway.errors import InvalidToolArguments, ToolFailed, ToolUnavailable
from gateway.observability.logs import log_event
from gateway.tools.config import LocalTool
from gateway.tools.port import ProviderHealth, ProviderKind, ToolContext, ToolResult, ToolSpec

_log = logging.getLogger("gateway.tools")

_OWN = frozenset({"api", "gateway", "gateway_cli", "sdk_adapter"})
_WHOLE = {"arguments", "context"}
_MARK = "__gateway_tool_source__"
"""On a module that was brought in here: its digest. What others brought in is theirs to reload."""


class LocalContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a local tool sees of the call it serves, as ``context``.

    ``agent`` is the canonical id of the agent (None for a direct call), ``user`` what the client said in ``user``,
    ``key_id`` the caller's key, ``source`` who asks (``sdk``, ``api``, ``mcp``), ``policy`` the bounds of the call:
    ``seconds_left`` and ``max_result_bytes``. ``caller`` is what the caller sent along: ``caller.credentials``.
    """

    agent: str | None
    request_id: str
    user: str | None
    key_id: str
    source: str
    run_id: str | None
    session_id: str | None
    call_id: str
    policy: dict[str, Any]
    caller: CallerContext = NOTHING


class ToolThreads:
    """The threads of sync callables: daemons, at most ``limit`` at once, each counted until it really ends."""

    def __init__(self, limit: int = 64) -> None:
        self._free = asyncio.Semaphore(limit)

    async def run(self, work: Callable[[], Any], own: asyncio.Semaphore) -> Any:
        """Run ``work`` in a thread; ``own`` bounds those of one tool. A caller that leaves does not free the thread."""
        await own.acquire()
        try:
            await self._free.acquire()
        except BaseException:
            own.release()
            raise
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def settle(result: Any, error: BaseException | None) -> None:
            self._free.release()
            own.release()
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)

        def target() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(work)
            except (SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit) as raised:
                error = RuntimeError(type(raised).__name__)
            except BaseException as raised:  # noqa: BLE001 - whatever it is, it is the tool's failure
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=target, name="tool", daemon=True).start()
        return await done


class LocalProvider:
    """One callable as a tool; imported in `open`, never in a call."""

    kind: ProviderKind = "local"

    def __init__(
        self,
        config: LocalTool,
        *,
        threads: ToolThreads,
        modules: ToolModules,
        max_threads: int,
        allowlist: Sequence[str],
        import_timeout_s: float,
    ) -> None:
        self.entry = config.name
        self._config = config
        self._threads = threads
        self._modules = modules
        self._own = asyncio.Semaphore(max_threads)
        self._allowlist = allowlist
        self._timeout_s = import_timeout_s
        self._callable: _Callable | None = None
        self._health = ProviderHealth()
        self._denied = False

    async def open(self) -> None:
        """Import the module and look at the callable, in a thread; a failure shows in `health` and at each call."""
        module = self._config.module
        if not any(fnmatchcase(module, pattern) for pattern in self._allowlist):
            self._denied = True
            self._down(
                f"'{module}' is not in local_tools_allowlist. Add it, or '{module.partition(':')[0]}:*', under default "
                "in security.yaml."
            )
            log_event(_log, "tool.module.blocked", level=logging.WARNING, tool_name=self.entry, module_path=module)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                self._callable = await self._threads.run(
                    lambda: _Callable(self._modules.find(module), self._config.schema), asyncio.Semaphore(2)
                )
        except TimeoutError:
            self._down(f"The import of '{module}' took longer than {self._timeout_s:g} s and was given up.")
        except Exception as error:  # noqa: BLE001 - a border: the operator's module
            self._down(f"'{module}' cannot be used: {_short(error)}")
            log_event(
                _log,
                "tool.module.failed",
                level=logging.ERROR,
                tool_name=self.entry,
                module_path=module,
                exc_info=error,
            )
        else:
            self._health = ProviderHealth(status="ok", checked_at=time.time())

    async def aclose(self) -> None:
        """Let the callable go; calls under way keep theirs."""
        self._callable = None

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the one tool."""
        found = self._callable
        return (
            ToolSpec(
                name=self.entry,
                entry=self.entry,
                provider="local",
                remote_name=self._config.module,
                description=self._config.description or (found.description if found else ""),
                parameters=found.schema if found else self._config.schema or {"type": "object", "properties": {}},
                quarantined=self._health.detail if self._denied else None,
            ),
        )

    async def refresh(self) -> None:
        """Do nothing: a refresh makes a new provider, with a new callable."""

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Call it; see `ToolProvider.call`."""
        found = self._callable
        if found is None:
            raise ToolUnavailable(
                f"The tool '{self.entry}' is not loaded: {self._health.detail or 'the gateway is reloading it.'}"
            )
        call = found.bind(arguments, _context(context))
        try:
            if found.is_async:
                return as_result(await call())
            return await self._threads.run(lambda: as_result(call()), self._own)  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # Even SystemExit: in the caller's task it would end the event loop.
            log_event(_log, "tool.call.crashed", level=logging.ERROR, tool_name=self.entry, exc_info=error)
            raise ToolFailed(f"The tool '{self.entry}' failed: it raised {type(error).__name__}.") from error

    def health(self) -> ProviderHealth:
        """Return whether the callable is loaded."""
        return self._health

    def _down(self, detail: str) -> None:
        self._health = ProviderHealth(status="down", detail=detail, checked_at=time.time())


class _Callable:
    """A callable with the schema of its arguments, and how to call it."""

    def __init__(self, function: Callable[..., Any], schema: dict[str, Any] | None) -> None:
        """Raise `TypeError` for one whose signature says too little."""
        self._function = function
        self._struct: type[msgspec.Struct] | None = None
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - its kind is asked for, not whether it is there
        )
        self.description = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ").strip()
        parameters = inspect.signature(function).parameters
        self._wants_context = "context" in parameters
        self._whole = "arguments" in parameters and set(parameters) <= _WHOLE
        if self._whole:
            self.schema = schema or {"type": "object", "additionalProperties": True}
            return
        if schema is None:
            self._struct = _struct_of(function, parameters)
            self.schema = _schema_of(self._struct)
        else:
            self.schema = schema

    def bind(self, arguments: Mapping[str, Any], context: LocalContext) -> Callable[[], Any]:
        """Return the call; `InvalidToolArguments` for values that the parameters' types do not take."""
        given: dict[str, Any] = {"context": context} if self._wants_context else {}
        if self._whole:
            given["arguments"] = dict(arguments)
        elif self._struct is None:
            given |= arguments
        else:
            try:
                values = msgspec.convert(dict(arguments), self._struct)
            except msgspec.ValidationError as error:
                raise InvalidToolArguments(f"arguments: {error}.", param="arguments") from error
            given |= {name: getattr(values, name) for name in arguments if name in self._struct.__struct_fields__}
        return lambda: self._function(**given)


def as_result(value: Any) -> ToolResult:
    """Return what a callable gave as a result: text as it is, anything else as JSON."""
    if isinstance(value, ToolResult):
        return value
    if value is None:
        return ToolResult(text="")
    if isinstance(value, str):
        return ToolResult(text=value)
    text = msgspec.json.encode(value, enc_hook=_plain).decode()
    return ToolResult(text=text, structured=msgspec.json.decode(text))


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"a {type(value).__name__} is no JSON value")


def _context(context: ToolContext) -> LocalContext:
    return LocalContext(
        agent=context.agent,
        request_id=context.request_id,
        user=context.user,
        key_id=context.principal.key_id,
        source=context.source,
        run_id=context.run_id,
        session_id=context.session_id,
        call_id=context.call_id,
        policy={
            "seconds_left": max(0.0, context.seconds_left()),
            "max_result_bytes": context.max_result_bytes,
        },
        caller=context.caller,
    )


def _struct_of(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> type[msgspec.Struct]:
    hints = typing.get_type_hints(function, include_extras=True)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for name, parameter in parameters.items():
        if name == "context":
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"its parameter '{name}' cannot be given by name; write 'schema' in tools.yaml")
        hint = hints.get(name)
        if hint is None:
            raise TypeError(f"its parameter '{name}' has no type; give it one, or write 'schema' in tools.yaml")
        if parameter.default is parameter.empty:
            fields.append((name, hint))
        else:
            # Behind a factory: the struct refuses mutable defaults, and what is not given is not passed on anyway.
            fields.append((name, hint, msgspec.field(default_factory=functools.partial(_same, parameter.default))))
    return msgspec.defstruct("arguments", fields, kw_only=True)


def _same(value: Any) -> Any:
    return value


def _schema_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    try:
        (top,), components = msgspec.json.schema_components((struct,), ref_template="#/$defs/{name}")
    except TypeError as error:
        raise TypeError(f"a parameter's type has no JSON schema ({error}); write 'schema' in tools.yaml") from error
    schema: dict[str, Any] = components.pop("arguments") if "$ref" in top else top
    schema.pop("title", None)
    schema["additionalProperties"] = False
    if components:
        schema["$defs"] = components
    return schema


class ToolModules:
    """The modules of one reload: each is brought in once, however many tools are its."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._found: dict[str, ModuleType] = {}

    def find(self, path: str) -> Callable[..., Any]:
        """Return the callable of ``pkg.mod:func``; what an earlier reload brought in is read anew."""
        name, _, attribute = path.partition(":")
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            found: Any = self._found.get(name)
            if found is None:
                found = self._found[name] = _module(name)
        for part in attribute.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise TypeError(f"'{attribute}' is not a callable of the module '{name}'")
        return typing.cast("Callable[..., Any]", found)


def _module(name: str) -> ModuleType:
    known = sys.modules.get(name)
    if known is not None and not hasattr(known, _MARK):
        return known
    if name.partition(".")[0] in _OWN:
        raise ImportError("the gateway's own modules are not tools")
    parent = name.rpartition(".")[0]
    if parent:
        importlib.import_module(parent)
    importlib.invalidate_caches()
    if known is not None:
        del sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no module named '{name}'; is its folder on PYTHONPATH?", name=name)
    if spec.origin is None or not spec.origin.endswith(".py"):
        return importlib.import_module(name)
    source = Path(spec.origin).read_bytes()
    module = importlib.util.module_from_spec(spec)
    setattr(module, _MARK, hashlib.sha256(source).hexdigest())
    sys.modules[name] = module
    try:
        # From the text: bytecode of an edit within the same second would be the old one.
        exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        if known is not None:
            sys.modules[name] = known
        else:
            sys.modules.pop(name, None)
        raise
    return module


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
