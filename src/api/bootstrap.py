"""The composition root: opens everything in order, hands it down by constructor, closes it in reverse."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from api.threads import DaemonThreadPool
from gateway.config import Settings
from gateway.observability.logs import configure_logging
from gateway.observability.metrics import Metrics
from gateway.registry.catalogue import AgentCatalogue
from gateway.registry.discovery import find_roots
from gateway.registry.policy import ModulePolicy, ModuleRules
from gateway.registry.registry import Registry
from gateway.reloading import Reloader
from gateway.routing.config import load_routing
from gateway.routing.table import Router
from gateway.routing.watching import watch_health
from gateway.runs.engine import RunEngine
from gateway.security.config import SecurityDefaults
from gateway.security.keys import Keyring
from gateway.snapshot import Snapshot, SnapshotHolder
from gateway.upstreams.config import UpstreamsConfig, load_upstreams
from gateway.upstreams.discovery import ModelDiscovery
from gateway.upstreams.table import UpstreamTable, open_upstreams
from gateway.usage.meter import Meter
from gateway.usage.prices import load_prices
from sdk_adapter.loader import SdkLoader
from sdk_adapter.services import AdapterServices


@dataclass(slots=True)
class Gateway:
    """Everything a handler may reach; one per process, alive between start-up and shutdown.

    ``refresh_upstreams`` reads `upstreams.yaml` again, probes every upstream and asks for their models; it raises
    `ConfigError` and changes nothing where the file is wrong. ``loaded`` is set once every drop-in present at start-up
    has been loaded or given up.
    """

    settings: Settings
    holder: SnapshotHolder
    metrics: Metrics
    engine: RunEngine
    catalogue: AgentCatalogue
    reloader: Reloader
    discovery: ModelDiscovery
    refresh_upstreams: Callable[[], Awaitable[None]]
    loaded: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_agents(self) -> None:
        """Return when the snapshot changed or the first load is complete, whichever comes first."""
        waits = [asyncio.ensure_future(self.holder.wait_for_change()), asyncio.ensure_future(self.loaded.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


@asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Open the gateway: it answers at once, and loads its agents in the background.

    Raises `ConfigError` when the configuration cannot be served at all; a broken drop-in is never a reason.
    """
    configure_logging(settings.log_level)
    drop_in_key = f"drop-in-{secrets.token_urlsafe(24)}"
    roots = find_roots(settings)
    keyring = Keyring.load(settings, drop_in_key)
    metrics = Metrics()
    asyncio.get_running_loop().set_default_executor(DaemonThreadPool())  # the loop closes it when it is closed
    async with AsyncExitStack() as stack:
        config = load_upstreams(settings)
        router = Router(metrics)
        rules = load_routing(settings, _names(config))
        upstreams = await stack.enter_async_context(open_upstreams(config, metrics))
        routes = router.build(upstreams.table, rules)
        meter = Meter(load_prices(settings), metrics)
        holder = SnapshotHolder(Snapshot(1, Registry(), upstreams.table, keyring, routes, meter))
        services = AdapterServices(lambda: holder.current.routes, metrics, settings, meter=lambda: holder.current.meter)
        stack.enter_context(_environment_of_drop_ins(settings, drop_in_key))
        loader = await stack.enter_async_context(
            SdkLoader(settings, services, _module_policy(settings, keyring.defaults))
        )

        def publish(registry: Registry) -> None:
            holder.swap(registry=registry)

        catalogue = await stack.enter_async_context(
            AgentCatalogue(settings, loader, roots, publish=publish, metrics=metrics)
        )

        def publish_models(table: UpstreamTable) -> None:
            holder.swap(upstreams=table, routes=router.build(table))

        discovery = ModelDiscovery(upstreams, publish_models, interval_s=settings.upstream_discovery_s)

        async def reload_upstreams() -> None:
            fresh = load_upstreams(settings)
            rules = load_routing(settings, _names(fresh))  # before anything changes: it may name what is gone
            table = await upstreams.refresh(fresh)
            holder.swap(upstreams=table, routes=router.build(table, rules))
            discovery.wake()
            await catalogue.recheck()

        async def reload_prices() -> None:
            holder.swap(meter=Meter(load_prices(settings), metrics))

        async def refresh_upstreams() -> None:
            meter = Meter(load_prices(settings), metrics)  # before anything changes, as above
            await reload_upstreams()
            holder.swap(meter=meter)
            table = holder.current.upstreams
            await asyncio.gather(*(upstream.check() for upstream in table.upstreams.values()))
            await discovery.refresh()

        async def reload_security() -> None:
            fresh = Keyring.load(settings, drop_in_key)
            holder.swap(keyring=fresh)
            loader.policy = _module_policy(settings, fresh.defaults)
            await catalogue.recheck()

        watched: dict[str, Callable[[], Awaitable[None]]] = {}
        if settings.agent_auto_reload:
            watched["security.yaml"] = reload_security
        if settings.agent_auto_reload or settings.upstream_auto_reload:
            watched["upstreams.yaml"] = watched["routing.yaml"] = reload_upstreams
            watched["prices.yaml"] = reload_prices
        reloader = Reloader(settings, catalogue, roots, on_change=watched)
        gateway = Gateway(
            settings, holder, metrics, RunEngine(metrics), catalogue, reloader, discovery, refresh_upstreams
        )
        await stack.enter_async_context(_background(gateway, watch=bool(watched)))
        yield gateway


@asynccontextmanager
async def _background(gateway: Gateway, *, watch: bool) -> AsyncIterator[None]:
    """Load the agents, then watch; both end with the gateway."""

    async def work() -> None:
        try:
            await gateway.catalogue.refresh()
        finally:
            gateway.loaded.set()

    tasks = [asyncio.create_task(work()), asyncio.create_task(gateway.discovery.run())]
    tasks.append(asyncio.create_task(watch_health(lambda: gateway.holder.current.routes)))
    if watch:
        tasks.append(asyncio.create_task(gateway.reloader.watch()))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


@contextmanager
def _environment_of_drop_ins(settings: Settings, drop_in_key: str) -> Iterator[None]:
    """Keep OpenAI's key out of the process: a client that a drop-in builds for itself lands in the gateway instead."""
    placed = {"OPENAI_API_KEY": drop_in_key, "OPENAI_BASE_URL": f"http://127.0.0.1:{settings.port}/v1"}
    before = {name: os.environ.get(name) for name in placed}
    os.environ.update(placed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _names(config: UpstreamsConfig) -> tuple[str, ...]:
    return tuple(upstream.name for upstream in config.upstreams)


def _module_policy(settings: Settings, defaults: SecurityDefaults) -> ModulePolicy:
    """Combine the environment's lists with those of `security.yaml`; deny wins wherever it stands."""
    return ModulePolicy(
        allow=(*settings.agent_allowlist, *defaults.dropin_module_allowlist),
        deny=(*settings.agent_denylist, *defaults.dropin_module_denylist),
        namespaces={
            name: ModuleRules(tuple(rules.dropin_module_allowlist), tuple(rules.dropin_module_denylist))
            for name, rules in defaults.namespace_defaults.items()
        },
    )
