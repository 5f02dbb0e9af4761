"""From a drop-in to its agents: import, find the exports, call the factories. Pre-flight and server share it."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from agents import Agent

from gateway.registry.entry import AgentOptions, Diagnostic
from gateway.registry.loading import DropIn, LoadFailed
from gateway.registry.policy import ModulePolicy
from sdk_adapter.diagnosis import diagnose, explain, label
from sdk_adapter.exports import Export, call_factory, check_agent, find_exports, read_options
from sdk_adapter.importing import importing
from sdk_adapter.modules import DropInFinder, Generation, ModuleBlocked, SourceChanged
from sdk_adapter.threads import run_in_thread


@dataclass(frozen=True, slots=True)
class Built:
    """The agents of one generation, with the names they are published under (see `Export`)."""

    generation: Generation
    agents: tuple[tuple[Export, Agent[Any]], ...]
    options: AgentOptions
    warnings: tuple[Diagnostic, ...]


async def build(
    dropin: DropIn,
    number: int,
    finder: DropInFinder,
    *,
    names: tuple[str, ...],
    policy: ModulePolicy,
    timeout_s: float,
    expected: Mapping[Path, str] | None = None,
) -> Built:
    """Import the drop-in in a thread of its own and make its agents; async factories run on this loop.

    Without ``expected`` (what a pre-flight read) every file is judged by ``policy`` before anything runs. Raises
    `LoadFailed` with what was read, or `SourceChanged`. A thread that outlives ``timeout_s`` cannot be stopped; it is
    left behind.
    """
    generation = Generation(dropin, number, finder, policy, expected)
    try:
        return await _build(generation, names, policy if expected is None else None, timeout_s)
    except BaseException as error:
        generation.release()
        if isinstance(error, LoadFailed):
            raise LoadFailed(*error.diagnostics, files=generation.files) from error
        raise


async def _build(
    generation: Generation, names: tuple[str, ...], judge_by: ModulePolicy | None, timeout_s: float
) -> Built:
    dropin = generation.dropin
    threads: list[int] = []

    def work() -> tuple[list[tuple[Export, Any]], AgentOptions, tuple[Diagnostic, ...]]:
        threads.append(threading.get_ident())
        if judge_by is not None:
            check_policy(generation, judge_by)
        module = _import(generation)
        try:
            exports = find_exports(module, dropin, names)
            options, warnings = read_options(module, dropin)
        except LoadFailed as error:
            raise LoadFailed(*error.diagnostics, *_stop_warnings(generation)) from error
        except BaseException as error:
            raise LoadFailed(explain(error, dropin, generation)) from error
        return [(export, _make(export, generation)) for export in exports], options, warnings

    try:
        made, options, warnings = await asyncio.wait_for(run_in_thread(work), timeout_s)
        agents = [(export, check_agent(await _finish(value, export, generation, timeout_s), export, dropin))
                  for export, value in made]  # fmt: skip
    except TimeoutError as error:
        place = _standing(threads, generation)
        raise LoadFailed(timed_out(dropin, timeout_s, *place)) from error
    found = (*warnings, *_stop_warnings(generation), *_shadow_warnings(generation))
    return Built(generation, tuple(agents), options, found)


def timed_out(dropin: DropIn, timeout_s: float, file: str | None = None, line: int | None = None) -> Diagnostic:
    """Return the diagnostic of an import that takes too long, with the line it stood at, if that is known."""
    return diagnose(
        dropin,
        "import_timeout",
        f"The import took longer than {timeout_s:g} s and was given up.",
        "Do slow work when the agent runs, not when its file is imported; GATEWAY_AGENT_IMPORT_TIMEOUT_S allows more.",
        kind="import",
        file=file,
        line=line,
    )


def _standing(threads: list[int], generation: Generation) -> tuple[str | None, int | None]:
    """Return the line of the author's code at which a thread stands."""
    frame = sys._current_frames().get(threads[0]) if threads else None
    while frame is not None:
        if generation.owns(frame.f_code.co_filename):
            return label(frame.f_code.co_filename, generation.dropin), frame.f_lineno
        frame = frame.f_back
    return None, None


def check_policy(generation: Generation, policy: ModulePolicy) -> None:
    """Judge a drop-in and the files it reaches by source alone; raise `LoadFailed`."""
    found = generation.judge(policy)
    if found is not None:
        raise LoadFailed(explain(ModuleBlocked(*found), generation.dropin, generation))


def _import(generation: Generation) -> ModuleType:
    try:
        with importing():
            return generation.import_entry()
    except SourceChanged:
        raise
    except BaseException as error:
        raise LoadFailed(explain(error, generation.dropin, generation)) from error


def _make(export: Export, generation: Generation) -> Any:
    if not export.is_factory:
        return export.value
    try:
        return call_factory(export, generation.dropin)
    except LoadFailed:
        raise
    except BaseException as error:
        what = f"factory '{export.attribute}'"
        raise LoadFailed(explain(error, generation.dropin, generation, what=what)) from error


async def _finish(value: Any, export: Export, generation: Generation, timeout_s: float) -> Any:
    if not export.is_factory or not inspect.isawaitable(value):
        return value
    try:
        async with asyncio.timeout(timeout_s):
            return await value
    except TimeoutError as error:
        raise LoadFailed(timed_out(generation.dropin, timeout_s)) from error
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        what = f"factory '{export.attribute}'"
        raise LoadFailed(explain(error, generation.dropin, generation, what=what)) from error


def _stop_warnings(generation: Generation) -> tuple[Diagnostic, ...]:
    return tuple(
        diagnose(
            generation.dropin,
            "run_at_import",
            "The file runs an agent when it is imported. It was read up to that line; what follows was not executed.",
            'Put what runs the agent under: if __name__ == "__main__":',
            kind="import",
            file=label(path, generation.dropin),
            line=line,
            is_warning=True,
        )
        for path, line in generation.stops.items()
    )


def _shadow_warnings(generation: Generation) -> tuple[Diagnostic, ...]:
    return tuple(
        diagnose(
            generation.dropin,
            "shadowed_helper",
            f"'import {name}' reaches {by}, not the file {name}.py beside the agent.",
            f"Write 'from . import {name}', or give the file a name of its own.",
            is_warning=True,
        )
        for name, by in generation.shadowed.items()
    )
