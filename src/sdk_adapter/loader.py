"""SdkLoader: drop-ins and declared agents become generations that run. Itself it needs no SDK until one is loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, cast

from gateway.config import Settings
from gateway.observability.logs import log_event
from gateway.registry.loading import Declaration, DropIn, LoadedGeneration, LoadFailed
from gateway.registry.policy import ModulePolicy
from gateway.registry.requirements import check_requirements
from sdk_adapter.containment import exits_contained
from sdk_adapter.diagnosis import diagnose, label
from sdk_adapter.modules import DropInFinder, SourceChanged, collect_garbage
from sdk_adapter.preflight import CheckReport, Preflight, PreflightUnavailable
from sdk_adapter.quick_import import quick_import
from sdk_adapter.services import AdapterServices
from sdk_adapter.threads import run_in_thread

_LOG = logging.getLogger(__name__)
_COLLECT_AFTER_S = 0.5
_ATTEMPTS = 5


class _Publishing(Protocol):
    """The module `sdk_adapter.publishing`, which is imported late."""

    def install(self, services: AdapterServices, /) -> AbstractContextManager[None]: ...

    async def publish_dropin(self, *arguments: Any, **options: Any) -> LoadedGeneration: ...

    async def publish_declared(self, *arguments: Any) -> LoadedGeneration: ...


class SdkLoader:
    """Implements `gateway.registry.loading.AgentLoader`.

    ``async with`` it; generations must have been released before it closes. The SDK is imported when `warm_up` is
    called or the first agent is loaded, in a thread, while the pre-flight's process imports it, too. ``policy`` may
    be replaced at any time; it holds for loads that begin later.
    """

    def __init__(
        self,
        settings: Settings,
        services: AdapterServices,
        policy: ModulePolicy | None = None,
        *,
        preflight: Preflight | None = None,
    ) -> None:
        self._settings = settings
        self._services = services
        self.policy = policy or ModulePolicy()
        self._preflight = preflight or Preflight()
        self._finder = DropInFinder()
        self._stack = ExitStack()
        self._sdk: asyncio.Task[_Publishing] | None = None
        self._imports = asyncio.Semaphore(2)
        self._collect_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._stack.enter_context(self._finder.installed())
        self._stack.enter_context(exits_contained())
        await self._preflight.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._collect_timer is not None:
            self._collect_timer.cancel()
        if self._sdk is not None:
            self._sdk.cancel()  # an import cannot be stopped; its thread ends with the process
            await asyncio.wait({self._sdk})
        await self._preflight.aclose()
        self._stack.close()

    async def warm_up(self) -> None:
        """Import the SDK here and in the pre-flight's process, at the same time; return when it is here."""
        await self._preflight.start()
        await self._publishing()

    async def load(self, dropin: DropIn, generation: int) -> LoadedGeneration:
        """See `AgentLoader.load`: requirements, pre-flight in a child, import, checks."""
        return await self._load(dropin, generation, None)

    async def load_declared(self, declaration: Declaration, generation: int) -> LoadedGeneration:
        """See `AgentLoader.load_declared`."""
        if declaration.dropin is not None:
            return await self._load(declaration.dropin, generation, declaration)
        publish = await self._publishing()
        return await publish.publish_declared(declaration, generation, self._services)

    async def check(self, dropin: DropIn) -> CheckReport:
        """Make the pre-flight alone: nothing is imported here."""
        try:
            return await self._preflight.check(
                dropin,
                names=self._settings.agent_exports,
                policy=self.policy,
                timeout_s=self._settings.agent_import_timeout_s,
            )
        except PreflightUnavailable as error:
            fix = "See the gateway's log and the machine's memory; POST /agents/refresh tries again."
            raise LoadFailed(diagnose(dropin, "preflight_unavailable", str(error), fix, kind="import")) from error

    async def _load(self, dropin: DropIn, generation: int, declaration: Declaration | None) -> LoadedGeneration:
        loading = self._start_publishing()
        await self._check_requirements(dropin)
        for _ in range(_ATTEMPTS):
            report = await self.check(dropin)
            if report.output:
                log_event(_LOG, "agent.dropin.printed", level=logging.DEBUG, file=dropin.label, output=report.output)
            if report.failed:
                raise LoadFailed(*report.diagnostics, files=report.hashes)
            publish = await asyncio.shield(loading)
            try:
                async with self._imports:
                    return await publish.publish_dropin(
                        dropin,
                        generation,
                        self._finder,
                        self._services,
                        policy=lambda: self.policy,
                        expected=report.hashes,
                        warnings=report.diagnostics,
                        on_release=self._collect_soon,
                        declaration=declaration,
                    )
            except SourceChanged:
                continue
        message = "The files kept changing while they were loaded."
        fix = "Save it once more when the other changes are done."
        raise LoadFailed(diagnose(dropin, "changed_while_loading", message, fix, kind="import"))

    async def _check_requirements(self, dropin: DropIn) -> None:
        if dropin.module is not None or dropin.is_single_file:
            return
        path = dropin.folder / "requirements.txt"
        problems = await asyncio.to_thread(check_requirements, path, label(path, dropin))
        if problems:
            raise LoadFailed(*(replace(item, occurred_at=time.time()) for item in problems))

    def _start_publishing(self) -> asyncio.Task[_Publishing]:
        if self._sdk is None:
            self._sdk = asyncio.create_task(self._import_sdk(), name="import of the Agents SDK")
        return self._sdk

    async def _publishing(self) -> _Publishing:
        return await asyncio.shield(self._start_publishing())

    async def _import_sdk(self) -> _Publishing:
        """Import what needs the SDK, in a thread: it takes more than a second, and is not needed without agents."""
        started = time.perf_counter()
        await self._preflight.start()
        importing = partial(quick_import, "sdk_adapter.publishing")
        publishing = cast("_Publishing", await run_in_thread(importing, name="import of the Agents SDK"))
        self._stack.enter_context(publishing.install(self._services))
        log_event(_LOG, "agent.sdk.imported", ms=round((time.perf_counter() - started) * 1000))
        return publishing

    def _collect_soon(self) -> None:
        """Collect what released generations leave behind, once for many."""
        if self._collect_timer is None:
            self._collect_timer = asyncio.get_running_loop().call_later(_COLLECT_AFTER_S, self._collect)

    def _collect(self) -> None:
        self._collect_timer = None
        collect_garbage()
