"""The composition root: opens everything in order, hands it down by constructor, closes it in reverse."""

from __future__ import annotations

import asyncio
import importlib
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from api.edge import Edge
from api.endpoint_stats import EndpointStats
from api.mcp.calls import McpCalls
from api.providers import Needs
from api.settings_check import check_settings
from api.shared import share
from api.states import share_states
from api.threads import DaemonThreadPool
from gateway.caching.cache import ResponseCache
from gateway.caching.config import load_cache
from gateway.config import ConfigFile, Settings, reading_config
from gateway.errors import StoreUnavailable
from gateway.limits.limiter import Limiter
from gateway.limits.opening import TABLES as LIMIT_TABLES
from gateway.limits.opening import open_limiter
from gateway.observability.logs import configure_logging
from gateway.observability.looplag import watch_loop
from gateway.observability.metrics import Metrics
from gateway.observability.traces import Tracer
from gateway.refreshing import Refresher
from gateway.registry.catalogue import AgentCatalogue
from gateway.registry.discovery import find_roots
from gateway.registry.policy import ModulePolicy, ModuleRules
from gateway.registry.registry import Registry
from gateway.reloading import Reloader
from gateway.routing.config import load_routing
from gateway.routing.table import Router
from gateway.routing.watching import watch_health
from gateway.runs.engine import RunEngine
from gateway.security.acl import AccessList
from gateway.security.config import SecurityDefaults, load_security
from gateway.security.keybook import KeyBook
from gateway.security.keys import ExpiryReminder, Keyring
from gateway.security.opening import open_issuers
from gateway.security.overrides import OverrideBook
from gateway.security.throttle import FailureThrottle
from gateway.snapshot import Snapshot, SnapshotHolder
from gateway.store.store import Store, database_url
from gateway.tools.manager import ToolManager
from gateway.tools.mcp.opening import open_mcp
from gateway.tools.registered import EntryBook
from gateway.tools.table import ToolTable
from gateway.upstreams.config import UpstreamsConfig, load_upstreams
from gateway.upstreams.discovery import ModelDiscovery
from gateway.upstreams.table import UpstreamTable, open_upstreams
from gateway.usage.ledger import Ledger, open_ledger
from gateway.usage.meter import Meter
from gateway.usage.prices import load_prices
from gateway.workers.keeping import ConfigKeeper, log_differences
from gateway.workers.workers import Workers
from sdk_adapter.loader import SdkLoader
from sdk_adapter.services import AdapterServices

STORE_MODULES = (
    "gateway.security.key_rows",
    "gateway.usage.rows",
    LIMIT_TABLES,
    "gateway.tools.mcp.pin_table",
    "gateway.tools.registered_rows",
)
"""Where the rooms declare their tables, as dotted names: each holds a `gateway.store.schema.Schema` as ``SCHEMA``."""

_FLUSH_S = 3.0
"""How long the last spans may take to leave."""


@dataclass(slots=True)
class Gateway:
    """Everything a handler may reach; one per process, alive between start-up and shutdown.

    ``workers`` are all processes of the gateway, ``refresher`` reads their configuration again. ``loaded`` is set once
    every drop-in present at start-up has been loaded or given up.
    """

    settings: Settings
    holder: SnapshotHolder
    metrics: Metrics
    engine: RunEngine
    catalogue: AgentCatalogue
    reloader: Reloader
    discovery: ModelDiscovery
    workers: Workers
    refresher: Refresher
    edge: Edge
    overrides: OverrideBook
    throttle: FailureThrottle
    store: Store
    tools: ToolManager
    tool_entries: EntryBook
    limiter: Limiter
    ledger: Ledger | None
    keys: KeyBook
    tracer: Tracer | None
    keeper: ConfigKeeper
    endpoints: EndpointStats = field(default_factory=EndpointStats)
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    mcp_calls: McpCalls = field(default_factory=McpCalls)
    needs: Needs = field(default_factory=Needs)

    async def wait_for_agents(self) -> None:
        """Return when the snapshot changed or the first load is complete, whichever comes first."""
        waits = [asyncio.ensure_future(self.holder.wait_for_change()), asyncio.ensure_future(self.loaded.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


@asynccontextmanager
async def open_gateway(
    settings: Settings, *, workers: Workers | None = None, own_port: int | None = None
) -> AsyncIterator[Gateway]:
    """Open the gateway: it answers at once, and loads its agents in the background.

    ``workers`` are the processes it is one of; by default the only one. ``own_port`` is where agents' own clients
    reach this very process on the loopback address; by default the gateway's port. Raises `ConfigError` when the
    configuration cannot be served at all; a broken drop-in is never a reason.
    """
    log = configure_logging(
        settings.log_level, exception_text=settings.log_exception_text, as_text=settings.log_format == "text"
    )
    workers = workers or Workers()
    drop_in_key = f"drop-in-{secrets.token_urlsafe(24)}"
    roots = find_roots(settings)
    check_settings(settings, is_alone=workers.is_alone)
    keeper = ConfigKeeper(workers)
    kept = await keeper.fetch()
    metrics = Metrics()
    asyncio.get_running_loop().set_default_executor(DaemonThreadPool())  # the loop closes it when it is closed
    async with AsyncExitStack() as stack:
        stack.callback(log.flush)
        reading = stack.enter_context(reading_config(kept))
        security = load_security(settings)
        store = await stack.enter_async_context(Store(database_url(settings), STORE_MODULES))
        keys = KeyBook(store, settings.key_pepper)
        issuers = await stack.enter_async_context(open_issuers(settings))
        tokens = await issuers.follow(security)
        keyring = Keyring.build(security, settings, drop_in_key, keys.keys, tokens=tokens)
        config = load_upstreams(settings)
        router = Router(metrics)
        rules = load_routing(settings, _names(config))
        upstreams = await stack.enter_async_context(open_upstreams(config, metrics))
        routes = router.build(upstreams.table, rules)
        stack.enter_context(watch_loop(metrics))
        tracer = await _open_tracer(stack, settings, metrics)
        ledger = await stack.enter_async_context(_ledger(settings, store, metrics)) if settings.usage_ledger else None

        def read_prices() -> Meter:
            return Meter(load_prices(settings), metrics, ledger)

        meter = read_prices()
        alone = workers.is_alone
        limiter = await stack.enter_async_context(open_limiter(settings, store, metrics, is_alone=alone))
        answers = await stack.enter_async_context(ResponseCache(metrics, settings.redis_url))
        cache = await answers.follow(load_cache(settings))
        first = Snapshot(1, Registry(), upstreams.table, keyring, routes, meter, cache=cache, metrics=metrics)
        holder = SnapshotHolder(first, on_swap=metrics.forget_models)
        metrics.show_models_as(holder.model_label)

        def publish_tools(table: ToolTable) -> None:
            holder.swap(tools=table)

        tools = await stack.enter_async_context(
            ToolManager(
                settings,
                metrics,
                publish=publish_tools,
                local_allowlist=lambda: holder.current.keyring.defaults.local_tools_allowlist,
                open_mcp=open_mcp(store),
            )
        )
        tool_entries = EntryBook(store, tools.follow)
        services = AdapterServices(
            lambda: holder.current.routes,
            metrics,
            settings,
            meter=lambda: holder.current.meter,
            access=lambda: holder.current.access,
            hides_foreign_models=lambda: holder.current.keyring.hide_foreign_models,
            tools=tools,
        )
        stack.enter_context(_environment_of_drop_ins(own_port or settings.port, drop_in_key))
        loader = await stack.enter_async_context(
            SdkLoader(settings, services, _module_policy(settings, keyring.defaults))
        )

        def publish(registry: Registry) -> None:
            holder.swap(registry=registry)
            keeper.keep(catalogue.declared_in)

        catalogue = await stack.enter_async_context(
            AgentCatalogue(settings, loader, roots, publish=publish, metrics=metrics)
        )

        def publish_models(table: UpstreamTable) -> None:
            holder.swap(upstreams=table, routes=router.build(table))

        discovery = ModelDiscovery(upstreams, publish_models, interval_s=settings.upstream_discovery_s)

        @keeper.keeping
        async def reload_upstreams() -> None:
            fresh = load_upstreams(settings)
            rules = load_routing(settings, _names(fresh))  # before anything changes: it may name what is gone
            table = await upstreams.refresh(fresh)
            holder.swap(upstreams=table, routes=router.build(table, rules))
            discovery.wake()
            await catalogue.recheck()

        @keeper.keeping
        async def reload_prices() -> None:
            holder.swap(meter=read_prices())

        @keeper.keeping
        async def reload_cache() -> None:
            holder.swap(cache=await answers.follow(load_cache(settings)))

        @keeper.keeping
        async def refresh_upstreams() -> None:
            meter = read_prices()  # before anything changes, as above
            kept = load_cache(settings)
            await reload_upstreams()
            holder.swap(meter=meter, cache=await answers.follow(kept))
            table = holder.current.upstreams
            await asyncio.gather(*(upstream.check() for upstream in table.upstreams.values()))
            await discovery.refresh()

        def publish_keys() -> None:
            built = Keyring.build(security, settings, drop_in_key, keys.keys, must_be_usable=False, tokens=tokens)
            holder.swap(keyring=built)

        keys.on_change = publish_keys

        @keeper.keeping
        async def reload_security() -> None:
            nonlocal security, tokens
            read = load_security(settings)
            verifier = await issuers.follow(read)
            fresh = Keyring.build(read, settings, drop_in_key, keys.keys, tokens=verifier)
            security, tokens = read, verifier
            allowed = holder.current.keyring.defaults.local_tools_allowlist
            holder.swap(keyring=fresh)
            if fresh.defaults.local_tools_allowlist != allowed:
                await tools.reload()
            loader.policy = _module_policy(settings, fresh.defaults)
            await catalogue.recheck()

        @keeper.keeping
        async def reload_tools() -> None:
            await tools.reload()
            await catalogue.recheck()

        @keeper.keeping
        async def refresh_tools() -> None:
            with suppress(StoreUnavailable):  # the entries known so far are served
                await tool_entries.refresh()
            await tools.refresh()
            await catalogue.recheck()

        files: dict[str, Callable[[], Awaitable[None]]] = {
            "security.yaml": reload_security,
            "upstreams.yaml": reload_upstreams,
            "routing.yaml": reload_upstreams,
            "prices.yaml": reload_prices,
            "cache.yaml": reload_cache,
            "tools.yaml": reload_tools,
        }
        watched = files
        if not settings.agent_auto_reload:
            others = files.keys() - {"security.yaml", "tools.yaml"} if settings.upstream_auto_reload else set()
            mine = others | ({"tools.yaml"} if settings.tool_auto_reload else set())
            watched = {name: reload for name, reload in files.items() if name in mine}
        referred = {"tools.yaml": tools.referred_files, "security.yaml": issuers.referred_files}
        reloader = Reloader(settings, catalogue, roots, on_change=watched, referred=referred)

        refresher = Refresher(
            settings,
            workers,
            lambda: holder.current.registry,
            parts={
                "agents": (reloader.refresh_agents, ("agents.yaml",)),
                "upstreams": (refresh_upstreams, tuple(files.keys() - {"security.yaml", "tools.yaml"})),
                "security": (reload_security, ("security.yaml",)),
                "tools": (refresh_tools, ("tools.yaml",)),
            },
            files=files,
        )

        def publish_access(access: AccessList) -> None:
            holder.swap(access=access)

        overrides = OverrideBook(publish_access)
        stack.callback(overrides.close)
        gateway = Gateway(
            settings=settings,
            holder=holder,
            metrics=metrics,
            engine=RunEngine(metrics, ledger, max_runs=settings.max_runs),
            catalogue=catalogue,
            reloader=reloader,
            discovery=discovery,
            workers=workers,
            refresher=refresher,
            edge=Edge.of(settings),
            overrides=overrides,
            throttle=FailureThrottle(settings.key_failures_per_minute, count=metrics.authenticated),
            store=store,
            tools=tools,
            tool_entries=tool_entries,
            ledger=ledger,
            keys=keys,
            limiter=limiter,
            tracer=tracer,
            keeper=keeper,
        )
        reading.end()
        keeper.keep(reading.files)
        log_differences(kept)
        if workers.is_alone:
            metrics.workers(serving=1, wanted=1)
        share(gateway)
        share_states(gateway)
        await stack.enter_async_context(_background(gateway, kept, watch=bool(watched)))
        yield gateway


@asynccontextmanager
async def _background(gateway: Gateway, kept: Mapping[str, ConfigFile], *, watch: bool) -> AsyncIterator[None]:
    """Load the agents, then watch; both end with the gateway."""

    async def work() -> None:
        try:
            with reading_config(kept):
                await gateway.catalogue.refresh()
        finally:
            gateway.loaded.set()

    tasks = [asyncio.create_task(work()), asyncio.create_task(gateway.discovery.run())]
    tasks.append(asyncio.create_task(watch_health(lambda: gateway.holder.current.routes)))
    tasks.append(asyncio.create_task(_follow_keys(gateway)))
    tasks.append(asyncio.create_task(gateway.tool_entries.run()))
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


async def _follow_keys(gateway: Gateway) -> None:
    """Learn of keys that others made and revoked, and end the runs of keys that ended."""
    reminder = ExpiryReminder(gateway.holder.current.keyring)

    def look() -> None:
        keyring = gateway.holder.current.keyring
        reminder.remind(keyring)
        if gateway.engine.deadlines.watched:
            gateway.engine.cut(keyring.honoured())

    await gateway.keys.run(look)


@contextmanager
def _environment_of_drop_ins(port: int, drop_in_key: str) -> Iterator[None]:
    """Keep OpenAI's key out of the process: a client that a drop-in builds for itself lands in the gateway instead."""
    placed = {"OPENAI_API_KEY": drop_in_key, "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
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


def _ledger(settings: Settings, store: Store, metrics: Metrics) -> AbstractAsyncContextManager[Ledger]:
    return open_ledger(store, metrics, flush_s=settings.usage_flush_s, retention_days=settings.usage_retention_days)


async def _open_tracer(stack: AsyncExitStack, settings: Settings, metrics: Metrics) -> Tracer | None:
    if not settings.traces:
        return None
    # OpenTelemetry takes 0.2 s and 15 MB: only where it is used.
    otlp = await asyncio.to_thread(importlib.import_module, "gateway.observability.otlp")
    tracer: Tracer = await stack.enter_async_context(
        otlp.open_tracer(
            os.environ.get("OTEL_SERVICE_NAME") or settings.project_name,
            settings.traces,
            with_content=settings.traces_content,
            flush_s=min(settings.drain_s, _FLUSH_S),
            count=metrics.trace_spans,
        )
    )
    return tracer


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
