"""Which upstream serves a name, and what a refresh keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.upstreams.config import UpstreamConfig, UpstreamsConfig
from gateway.upstreams.table import UnknownModel, UnknownUpstream, UpstreamTable, open_upstreams
from tests.support.scripted_answers import Answer
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.upstream_calls import chat_request, collect, text_of


def upstream(name: str, **fields: Any) -> UpstreamConfig:
    return UpstreamConfig(name=name, **({"base_url": f"http://{name}.test/v1", "api": "chat"} | fields))


def with_table(check: Callable[[UpstreamTable], None], *upstreams: UpstreamConfig, **fields: Any) -> None:
    async def main() -> None:
        async with open_upstreams(UpstreamsConfig(upstreams=upstreams, **fields)) as owner:
            check(owner.table)

    asyncio.run(main())


LOCAL = upstream("local", models=("qwen3-8b", "llama*", "openai/gpt-oss-20b"), default_model="qwen3-8b")
OPENAI = upstream("openai", provider="openai", models=("gpt-*", "o[0-9]*"), api="responses")
ANYTHING = upstream("anything")
DEMO = UpstreamConfig(name="demo", provider="demo", models=("demo",), default_model="demo")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (None, {}, "local/qwen3-8b"),
        (None, {"default_model": "gpt-5"}, "openai/gpt-5"),
        (None, {"upstream": "local"}, "local/qwen3-8b"),
        ("qwen3-8b", {}, "local/qwen3-8b"),
        ("llama3.2", {}, "local/llama3.2"),
        ("gpt-5-mini", {}, "openai/gpt-5-mini"),
        ("o3-mini", {}, "local/qwen3-8b"),  # an exact alias
        ("gpt-4-turbo", {}, "local/llama-turbo"),  # an alias pattern goes before a pattern of an upstream
        ("claude-9", {}, "anything/claude-9"),  # an alias that keeps the name
        ("openai/gpt-5", {}, "openai/gpt-5"),
        ("openai/gpt-oss-20b", {"upstream": "local"}, "local/openai/gpt-oss-20b"),
        ("openai/gpt-oss-20b", {}, "openai/gpt-oss-20b"),
        ("anything/meta/llama", {}, "anything/meta/llama"),
        ("what-ever", {"upstream": "anything"}, "anything/what-ever"),
        ("gpt-5", {"upstream": "anything"}, "anything/gpt-5"),
        ("o3-mini", {"upstream": "openai"}, "openai/o3-mini"),
    ],
)
def test_name_is_resolved(name: str | None, options: dict[str, str], expected: str) -> None:
    def check(table: UpstreamTable) -> None:
        bound = table.resolve(name, **options)
        assert f"{bound.upstream.name}/{bound.model}" == expected

    aliases = {"o3-mini": "local/qwen3-8b", "gpt-4*": "local/llama-turbo", "claude-*": "anything/*"}
    with_table(check, LOCAL, OPENAI, ANYTHING, aliases=aliases)


def test_sdk_spelling_of_openai_reaches_an_alias() -> None:
    def check(table: UpstreamTable) -> None:
        assert table.resolve("openai/gpt-5").model == "qwen3-8b"

    with_table(check, LOCAL, aliases={"gpt-*": "local/qwen3-8b"})


@pytest.mark.parametrize(
    ("name", "options", "kind", "sentence"),
    [
        ("gpt-5", {}, UnknownModel, 'under aliases: "gpt-5": local/qwen3-8b'),
        ("qwen3-8", {}, UnknownModel, "Did you mean 'qwen3-8b'"),
        ("mistral", {"upstream": "local"}, UnknownModel, "not served by the upstream 'local'"),
        ("local/mistral", {}, UnknownModel, "is not served by any configured upstream"),
        (None, {"upstream": "anything"}, UnknownModel, "default_model of 'anything'"),
        ("x", {"upstream": "lokal"}, UnknownUpstream, "Did you mean 'local'"),
    ],
)
def test_unknown_name_says_how_to_mend_it(
    name: str | None, options: dict[str, str], kind: type[ConfigError], sentence: str
) -> None:
    def check(table: UpstreamTable) -> None:
        with pytest.raises(kind, match=sentence):
            table.resolve(name, **options)

    with_table(check, LOCAL, ANYTHING)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("local/llama3.2", "local/llama*"),
        ("anything/what-ever", "anything/*"),
        ("openai/o3-mini", "openai/o[0-9]*"),
        ("gpt-5", "gpt-*"),
        ("claude-9", "claude-*"),
        ("local/mistral", None),
        ("mistral", None),
    ],
)
def test_pattern_that_lets_a_name_through(name: str, pattern: str | None) -> None:
    def check(table: UpstreamTable) -> None:
        assert table.find_pattern(name) == pattern

    with_table(check, LOCAL, OPENAI, ANYTHING, aliases={"claude-*": "anything/*", "o3": "local/qwen3-8b"})


def test_demo_takes_every_name() -> None:
    def check(table: UpstreamTable) -> None:
        for name in (None, "gpt-5-mini", "demo", "openai/gpt-5", "meta/llama"):
            assert table.resolve(name).upstream.name == "demo"
        assert table.find_model("demo/demo") is not None
        assert table.find_model("demo/other") is None

    with_table(check, DEMO)


def test_default_model_of_the_settings() -> None:
    def check(table: UpstreamTable) -> None:
        assert table.default.name == "openai"
        assert table.resolve(None).model == "gpt-x"
        assert table.resolve(None, upstream="local").model == "qwen3-8b"

    with_table(check, LOCAL, OPENAI, default_upstream="openai", default_model="gpt-x")


def test_raw_models_are_found_by_their_exact_id() -> None:
    def check(table: UpstreamTable) -> None:
        for model_id in ("local/qwen3-8b", "local/llama3", "openai/gpt-5", "anything/a/b"):
            bound = table.find_model(model_id)
            assert bound is not None
            assert f"{bound.upstream.name}/{bound.model}" == model_id
        for model_id in ("local", "local/", "local/gpt-5", "LOCAL/qwen3-8b", "nope/x", "qwen3-8b", "/x", ""):
            assert table.find_model(model_id) is None
        assert [model.id for model in table.list_models()] == ["local/qwen3-8b", "local/openai/gpt-oss-20b"]

    with_table(check, LOCAL, OPENAI, ANYTHING)


def test_hosted_tools_need_responses() -> None:
    def check(table: UpstreamTable) -> None:
        has = {name: item.has_hosted_tool("web_search") for name, item in table.upstreams.items()}
        assert has == {"openai": True, "chatty": False, "listed": True, "local": False}
        assert table.upstreams["listed"].has_hosted_tool("hosted_mcp")
        assert not table.upstreams["listed"].has_hosted_tool("file_search")

    listed = upstream("listed", api="responses", hosted_tools=("web_search_preview", "mcp"))
    with_table(check, OPENAI, upstream("chatty", provider="openai", hosted_tools=("web_search",)), listed, LOCAL)


def test_refresh_keeps_what_did_not_change_and_lets_streams_end() -> None:
    async def main() -> None:
        with ScriptedUpstream() as first, ScriptedUpstream() as second:
            kept = upstream("kept", base_url=second.base_url)
            before = upstream("changed", base_url=first.base_url)
            async with open_upstreams(UpstreamsConfig(upstreams=(kept, before))) as owner:
                old = owner.table
                gate = first.gate()
                first.enqueue(Answer(text="one two", gate=gate))
                stream = old.upstreams["changed"].chat_stream(chat_request(stream=True))
                await anext(stream)
                after = upstream("changed", base_url=second.base_url)
                new = await owner.refresh(UpstreamsConfig(upstreams=(kept, after)))
                assert owner.table is new
                assert new.upstreams["kept"] is old.upstreams["kept"]
                assert new.upstreams["changed"] is not old.upstreams["changed"]
                await new.upstreams["changed"].chat(chat_request())
                gate.open()
                assert text_of(await collect(stream)) == "one two"
                await asyncio.to_thread(first.wait_closed, 1)
                with pytest.raises(ConfigError):
                    await owner.refresh(UpstreamsConfig())
                assert owner.table is new
            await asyncio.to_thread(second.wait_closed, 1)

    asyncio.run(main())
