"""What upstreams list themselves: fetched beside requests, filtered, kept while a server is down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.errors import UpstreamMalformed
from gateway.upstreams.config import UpstreamConfig, UpstreamsConfig
from gateway.upstreams.discovery import ModelDiscovery
from gateway.upstreams.model_list import MOST_MODELS, read_model_list
from gateway.upstreams.table import OpenUpstreams, UpstreamTable, open_upstreams
from tests.support.scripted_upstream import Answer, ScriptedUpstream


class Published(list[UpstreamTable]):
    """The tables in order; ``full`` is set with the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.full = asyncio.Event()

    def take(self, table: UpstreamTable) -> None:
        self.append(table)
        if len(self) == 2:
            self.full.set()


Check = Callable[[OpenUpstreams, ModelDiscovery, Published], Awaitable[None]]


def models_answer(*names: str) -> Answer:
    return Answer(body={"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def with_discovery(server: ScriptedUpstream, check: Check, *, interval_s: float = 300.0, **fields: Any) -> None:
    config = UpstreamConfig(name="up", base_url=server.base_url, api="chat", **({"discover": True} | fields))

    async def main() -> None:
        published = Published()
        async with open_upstreams(UpstreamsConfig(upstreams=(config,))) as owner:
            await check(owner, ModelDiscovery(owner, published.take, interval_s=interval_s), published)

    asyncio.run(main())


def ids(table: UpstreamTable) -> list[str]:
    return [model.id for model in table.list_models()]


def test_what_the_upstream_lists_is_filtered_by_models() -> None:
    async def check(owner: OpenUpstreams, discovery: ModelDiscovery, published: Published) -> None:
        assert ids(owner.table) == ["up/named"]
        await discovery.refresh()
        assert ids(owner.table) == ["up/named", "up/gpt-a", "up/gpt-b"]
        assert published == [owner.table]
        assert owner.table.upstreams["up"].status.healthy is True

    with ScriptedUpstream() as server:
        server.enqueue_listings(models_answer("gpt-a", "other", "gpt-b", "named", "gpt-a"))
        with_discovery(server, check, models=("named", "gpt-*"))


def test_an_upstream_that_is_down_keeps_its_last_list_and_says_why() -> None:
    async def check(owner: OpenUpstreams, discovery: ModelDiscovery, published: Published) -> None:
        await discovery.refresh()
        await discovery.refresh()
        assert ids(owner.table) == ["up/a"]
        assert len(published) == 1
        status = owner.table.upstreams["up"].status
        assert status.healthy is False
        assert status.last_error is not None
        assert "503" not in status.last_error or "up" in status.last_error

    with ScriptedUpstream() as server:
        server.enqueue_listings(models_answer("a"), Answer(status=503, body={}))
        with_discovery(server, check)


def test_a_refresh_of_the_file_keeps_the_list_of_an_upstream_at_the_same_address() -> None:
    async def check(owner: OpenUpstreams, discovery: ModelDiscovery, published: Published) -> None:
        await discovery.refresh()
        old = owner.table.upstreams["up"].config
        for models, expected in ((("a*",), ["up/a1"]), (("none",), ["up/none"])):
            fresh = UpstreamConfig(name="up", base_url=old.base_url, api="chat", discover=True, models=models)
            assert ids(await owner.refresh(UpstreamsConfig(upstreams=(fresh,)))) == expected
        moved = UpstreamConfig(name="up", base_url="http://127.0.0.1:9/v1", api="chat", discover=True)
        assert ids(await owner.refresh(UpstreamsConfig(upstreams=(moved,)))) == []

    with ScriptedUpstream() as server:
        server.enqueue_listings(models_answer("a1", "b1"))
        with_discovery(server, check)


def test_the_background_task_asks_at_once_and_again() -> None:
    async def check(owner: OpenUpstreams, discovery: ModelDiscovery, published: Published) -> None:
        task = asyncio.create_task(discovery.run())
        async with asyncio.timeout(5):
            await published.full.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert ids(owner.table) == ["up/b"]

    with ScriptedUpstream() as server:
        server.enqueue_listings(models_answer("a"), *[models_answer("b")] * 1000)
        with_discovery(server, check, interval_s=0.02)


def test_an_upstream_that_does_not_discover_is_not_asked() -> None:
    async def check(owner: OpenUpstreams, discovery: ModelDiscovery, published: Published) -> None:
        await discovery.refresh()

    with ScriptedUpstream() as server:
        with_discovery(server, check, discover=False)
        assert not server.listings


def test_aliases_that_are_names_are_models_of_clients() -> None:
    config = UpstreamConfig(name="up", base_url="http://up.test/v1", api="chat", models=("m",))
    aliases = {"gpt-4o": "up/m", "o3*": "up/m", "kept": "up/*", "up/m": "up/other"}

    async def main() -> None:
        async with open_upstreams(UpstreamsConfig(upstreams=(config,), aliases=aliases)) as owner:
            table = owner.table
            assert ids(table) == ["up/m", "gpt-4o", "kept"]
            found = {name: table.find_model(name) for name in ("gpt-4o", "kept", "o3", "o3*", "up/m", "gpt-4O")}
            assert {name: bound.model for name, bound in found.items() if bound} == {
                "gpt-4o": "m",
                "kept": "kept",
                "up/m": "other",
            }

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b'{"data": [{"id": "a"}, {"id": "b", "x": 1}]}', ("a", "b")),
        (b' [{"id": "a/b"}]', ("a/b",)),
        (b'{"data": [{"id": "models/gemini-2.5-flash"}]}', ("gemini-2.5-flash",)),
        (b'{"data": [{"id": "a b"}, {"id": ""}, {"id": "\xc3\xa9"}, {"x": 1}]}', ()),
        (b'{"data": [{"id": "%s"}]}' % (b"x" * 201), ()),
    ],
)
def test_model_list_is_read(data: bytes, names: tuple[str, ...]) -> None:
    assert read_model_list("up", data) == names


@pytest.mark.parametrize("data", [b"", b"<html>", b'{"data": 3}', b'{"data": [3]}', b'"x"', b"[" * 100_000])
def test_a_list_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(UpstreamMalformed, match="'up' does not answer /models"):
        read_model_list("up", data)


def test_an_endless_list_is_cut() -> None:
    data = b'{"data": [%s]}' % b",".join(b'{"id": "m%d"}' % n for n in range(MOST_MODELS + 5))
    assert len(read_model_list("up", data)) == MOST_MODELS
