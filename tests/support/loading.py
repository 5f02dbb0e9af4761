"""Drop-ins in a test's folder, and a catalogue over them with the real loader, on a loop of its own in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gateway.config import Settings
from gateway.observability.metrics import Metrics
from gateway.registry.catalogue import AgentCatalogue
from gateway.registry.entry import AgentEntry, Diagnostic
from gateway.registry.loading import DropIn
from gateway.registry.registry import Registry
from gateway.upstreams.config import UpstreamConfig, UpstreamsConfig, load_upstreams
from gateway.upstreams.table import open_upstreams
from sdk_adapter.loader import SdkLoader
from sdk_adapter.services import AdapterServices

T = TypeVar("T")

GOOD = 'from agents import Agent\n\nagent = Agent(name="{name}", instructions="{text}")\n'


def write(root: Path, name: str, text: str) -> Path:
    """Write one file below ``root``, folders included."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_agent(root: Path, folder: str, text: str = "x", *, name: str = "Some Agent", extra: str = "") -> Path:
    """Write a good ``agent.py`` whose instructions are ``text``; ``extra`` is put before it."""
    return write(root, f"{folder}/agent.py", extra + GOOD.format(name=name, text=text))


def dropin_at(root: Path, folder: str = "Some") -> DropIn:
    """Return the drop-in of a folder directly in ``root``."""
    return DropIn("default", folder.lower(), root, root / folder, root / folder / "agent.py", f"{folder}/agent.py")


class Bench:
    """The real loader with two upstreams (``demo`` and ``local``), alive for many tests; `catalogue` is per test."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.metrics = Metrics()
        self.settings = Settings(agent_import_timeout_s=60.0)
        self.loader: SdkLoader
        self.upstreams: Any

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run a coroutine on the bench's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    async def open(self, stack: AsyncExitStack) -> None:
        local = UpstreamConfig(
            name="local", base_url="http://127.0.0.1:9/v1", api="chat", models=("small",), default_model="small"
        )
        config = load_upstreams(self.settings, {})
        config = UpstreamsConfig(upstreams=(*config.upstreams, local), default_upstream="demo")
        self.upstreams = await stack.enter_async_context(open_upstreams(config))
        services = AdapterServices(lambda: self.upstreams.table, self.metrics, self.settings)
        self.loader = await stack.enter_async_context(SdkLoader(self.settings, services))

    @contextmanager
    def catalogue(self, *roots: Path, settings: Settings | None = None) -> Iterator[Shelf]:
        """A catalogue over ``roots``, closed at the end."""
        shelf = Shelf(self)

        async def enter() -> AgentCatalogue:
            catalogue = AgentCatalogue(
                settings or self.settings, self.loader, roots, publish=shelf.published.append, metrics=self.metrics
            )
            return await catalogue.__aenter__()

        shelf.catalogue = self.run(enter())
        try:
            yield shelf
        finally:
            self.run(shelf.catalogue.__aexit__(None, None, None))


class Shelf:
    """One test's catalogue and what it published."""

    catalogue: AgentCatalogue

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.published: list[Registry] = []

    def refresh(self, **options: Any) -> Any:
        """Refresh and wait."""
        return self.bench.run(self.catalogue.refresh(**options))

    def entry(self, name: str) -> AgentEntry:
        """Return an entry that must be there."""
        entry = self.catalogue.registry.find(name)
        assert entry is not None, [row.id for row in self.catalogue.registry.list_entries()]
        return entry

    def problem(self, name: str) -> Diagnostic:
        """Return the first diagnostic of an entry."""
        return self.entry(name).diagnostics[0]

    def instructions(self, name: str) -> str:
        """Return what the loaded agent is told."""
        executor: Any = self.entry(name).executor
        return str(executor._agent.instructions)


@contextmanager
def open_bench() -> Iterator[Bench]:
    """Open a bench in a thread of its own; the pre-flight's process lives as long."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    bench = Bench(loop)
    stack = AsyncExitStack()
    try:
        bench.run(bench.open(stack))
        yield bench
    finally:
        bench.run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
