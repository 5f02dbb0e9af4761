"""The catalogue and the watcher: what changed is loaded, what broke keeps its last good version."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.registry.policy import ModulePolicy
from gateway.reloading import Reloader
from gateway.upstreams.config import UpstreamConfig, UpstreamsConfig
from tests.support.loading import Bench, Shelf, open_bench, write, write_agent
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench() as opened:
        yield opened


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "agents").mkdir()
    return (tmp_path / "agents").resolve()


@pytest.fixture
def shelf(bench: Bench, root: Path) -> Iterator[Shelf]:
    with bench.catalogue(root) as opened:
        yield opened


def test_add_change_delete(shelf: Shelf, root: Path) -> None:
    path = write_agent(root, "Some", "one")
    assert shelf.refresh().loaded == ("default/some",)
    entry = shelf.entry("default/some")
    assert (entry.status, entry.kind, entry.source, entry.file) == ("ready", "sdk", "file", "Some/agent.py")
    assert (entry.display_name, entry.aliases[0], entry.upstream, entry.model) == (
        "Some Agent",
        "some-agent",
        "demo",
        "demo",
    )
    assert entry.created == int(path.stat().st_mtime) and entry.content_hash
    assert shelf.entry("some-agent") is shelf.entry("SOMEAGENT") is entry
    write_agent(root, "Some", "two")
    shelf.refresh()
    assert shelf.instructions("some") == "two"
    assert shelf.entry("some").generation > entry.generation
    path.unlink()
    assert shelf.refresh().removed == ("default/some",)
    assert shelf.catalogue.registry.find("default/some") is None


def test_a_refresh_without_a_change_imports_nothing(shelf: Shelf, root: Path) -> None:
    path = write_agent(root, "Some")
    shelf.refresh()
    before, published = shelf.entry("some"), len(shelf.published)
    path.touch()
    for options in ({}, {"force": True}, {"paths": {path}}):
        report = shelf.refresh(**options)
        assert (report.loaded, report.failed, report.unchanged) == ((), (), 1)
    assert shelf.entry("some") is before and len(shelf.published) == published


def test_an_unchanged_neighbour_is_left_alone(shelf: Shelf, root: Path) -> None:
    write_agent(root, "Some")
    write_agent(root, "Other")
    shelf.refresh()
    before = shelf.entry("some")
    write_agent(root, "Other", "changed")
    assert shelf.refresh().loaded == ("default/other",)
    assert shelf.entry("some").executor is before.executor


def test_same_size_edit_within_the_same_timestamp(shelf: Shelf, root: Path) -> None:
    path = write_agent(root, "Some", "aaa")
    stamp = path.stat()
    shelf.refresh()
    write_agent(root, "Some", "bbb")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    shelf.refresh()
    assert shelf.instructions("some") == "bbb"


def test_a_broken_edit_keeps_serving_and_says_why(shelf: Shelf, root: Path) -> None:
    write_agent(root, "Some", "good")
    shelf.refresh()
    good = shelf.entry("some")
    write(root, "Some/agent.py", "def broken(:\n")
    assert shelf.refresh().failed == ("default/some",)
    stale = shelf.entry("some")
    assert (stale.status, stale.executor, stale.generation) == ("stale", good.executor, good.generation)
    assert (stale.diagnostics[0].code, stale.diagnostics[0].line) == ("syntax_error", 1)
    assert shelf.catalogue.recent_errors()[0] == stale.diagnostics[0]
    write_agent(root, "Some", "mended")
    shelf.refresh()
    assert (shelf.entry("some").status, shelf.entry("some").diagnostics) == ("ready", ())
    assert shelf.instructions("some") == "mended"


def test_one_that_never_loaded_is_listed_as_an_error(shelf: Shelf, root: Path) -> None:
    write(root, "labs/Some/agent.py", "import sys\nsys.exit(1)\n")
    shelf.refresh()
    entry = shelf.entry("labs/some")
    assert (entry.status, entry.executor, entry.diagnostics[0].code) == ("error", None, "import_exit")
    assert entry.file == "labs/Some/agent.py"
    failures = shelf.bench.metrics.snapshot()["dropin_failures"]
    assert failures["import"] >= 1


def test_several_agents_of_one_file(shelf: Shelf, root: Path) -> None:
    write(
        root,
        "Desk/agent.py",
        "from agents import Agent\nsales = Agent(name='Assistant')\nsupport = Agent(name='Assistant')\n"
        "__agents__ = [sales, support]\n__gateway__ = {'namespace': 'labs'}\n",
    )
    shelf.refresh()
    assert [row.id for row in shelf.catalogue.registry.list_entries()] == ["labs/desk", "labs/desk-support"]
    assert shelf.catalogue.registry.find("assistant") is None


def test_helper_files_inside_and_outside_count(
    shelf: Shelf, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path_factory.mktemp("library")
    monkeypatch.syspath_prepend(library)
    write(library, "outer_words.py", "A = 'a1'\n")
    write(root, "Some/inner.py", "B = 'b1'\n")
    write(root, "Some/prompt.txt", "c1")
    path = write_agent(root, "Some", extra="import inner, outer_words, pathlib\n")
    whole = "pathlib.Path(__file__).with_name('prompt.txt').read_text()"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"x"', f"outer_words.A + inner.B + {whole}"), encoding="utf-8"
    )
    shelf.refresh()
    assert shelf.instructions("some") == "a1b1c1"
    for file, text, told in (
        (library / "outer_words.py", "A = 'a2'\n", "a2b1c1"),
        (root / "Some/inner.py", "B = 'b2'\n", "a2b2c1"),
        (root / "Some/prompt.txt", "c2", "a2b2c2"),
    ):
        file.write_text(text, encoding="utf-8")
        shelf.refresh(paths={file})
        assert shelf.instructions("some") == told
    assert shelf.catalogue.tracked_files() == {library / "outer_words.py"}


def test_a_helper_that_was_missing_is_a_reason_to_try_again(shelf: Shelf, root: Path, tmp_path: Path) -> None:
    write_agent(root, "Some", extra="import not_there_yet\n")
    shelf.refresh()
    assert shelf.problem("some").code == "missing_package"
    helper = write(root, "Some/not_there_yet.py", "")
    shelf.refresh(paths={helper})
    assert shelf.entry("some").status == "ready"


def test_requirements_are_checked_before_the_import(shelf: Shelf, root: Path) -> None:
    write_agent(root, "Some", extra="raise AssertionError('not imported')\n")
    write(root, "Some/requirements.txt", "surely-not-installed>=3\n")
    shelf.refresh()
    problem = shelf.problem("some")
    assert (problem.kind, problem.code, problem.file) == ("dependency", "requirement_missing", "Some/requirements.txt")
    assert "surely-not-installed>=3" in problem.message and problem.fix.startswith(
        "In the folder of agents, run: python -m pip install -r Some/requirements.txt"
    )
    write(root, "Some/requirements.txt", "msgspec\n")
    write_agent(root, "Some")
    shelf.refresh()
    assert shelf.entry("some").status == "ready"


def test_case_and_separator_twins_clash_and_the_one_that_serves_goes_on(shelf: Shelf, root: Path) -> None:
    write_agent(root, "my_bot", "the first")
    shelf.refresh()
    write_agent(root, "My-Bot", "the second")
    shelf.refresh()
    assert shelf.instructions("default/my-bot") == "the first"
    [rejected] = shelf.catalogue.registry.rejected
    assert rejected.diagnostics[0].code == "name_clash"
    assert "my_bot/agent.py" in rejected.diagnostics[0].message and "My-Bot/agent.py" in rejected.diagnostics[0].message
    (root / "my_bot/agent.py").unlink()
    shelf.refresh()
    assert shelf.instructions("default/my-bot") == "the second" and not shelf.catalogue.registry.rejected


def test_a_broken_newcomer_does_not_take_a_name(shelf: Shelf, root: Path) -> None:
    write(root, "A_Bot/agent.py", "broken(\n")
    shelf.refresh()
    write_agent(root, "a-bot", "good")
    shelf.refresh()
    assert shelf.instructions("a-bot") == "good"


def test_duplicate_tools_and_hosted_tools_are_refused(shelf: Shelf, root: Path) -> None:
    twice = "from agents import Agent, WebSearchTool, function_tool\n"
    twice += "@function_tool\ndef look(word: str) -> str: return word\n"
    write(root, "Twice/agent.py", twice + "agent = Agent(name='T', tools=[look, look])\n")
    write(root, "Hosted/agent.py", twice + "agent = Agent(name='H', tools=[WebSearchTool()])\n")
    write(root, "Fixed/agent.py", "from agents import Agent\nagent = Agent(name='F', model='gpt-5')\n"
          "__gateway__ = {'upstream': 'local'}\n")  # fmt: skip
    shelf.refresh()
    assert shelf.problem("twice").code == "duplicate_tool" and "look" in shelf.problem("twice").message
    assert shelf.problem("hosted").code == "hosted_tool_unsupported" and "web_search" in shelf.problem("hosted").message
    fixed = shelf.problem("fixed")
    assert (fixed.code, fixed.line) == ("unknown_model", 2)
    assert "'gpt-5'" in fixed.message and "aliases" in fixed.fix


def test_new_upstreams_are_judged_without_an_import(shelf: Shelf, root: Path) -> None:
    write_agent(root, "Some", extra="__gateway__ = {'upstream': 'local'}\n")
    write_agent(root, "Other", extra="__gateway__ = {'upstream': 'soon'}\n")
    shelf.refresh()
    assert (shelf.entry("some").status, shelf.problem("other").code) == ("ready", "unknown_upstream")
    old = shelf.bench.upstreams._config
    generation = shelf.entry("some").generation

    async def swap(config: UpstreamsConfig) -> None:
        await shelf.bench.upstreams.refresh(config)
        await shelf.catalogue.recheck()

    soon = UpstreamConfig(name="soon", base_url="http://127.0.0.1:9/v1", api="chat", default_model="m")
    demo = next(item for item in old.upstreams if item.name == "demo")
    try:
        shelf.bench.run(swap(UpstreamsConfig(upstreams=(demo, soon))))
        assert shelf.problem("some").code == "unknown_upstream" and shelf.entry("some").status == "error"
        assert (shelf.entry("other").status, shelf.entry("other").model) == ("ready", "m")
    finally:
        shelf.bench.run(swap(old))
    assert shelf.entry("some").status == "ready"
    assert shelf.entry("some").generation >= generation


def test_a_new_module_policy_holds_for_what_is_loaded(shelf: Shelf, root: Path) -> None:
    write_agent(root, "Some", extra="import ctypes\n")
    shelf.refresh()
    loader = shelf.bench.loader
    try:
        loader.policy = ModulePolicy(deny=("ctypes",))
        shelf.bench.run(shelf.catalogue.recheck())
        assert (shelf.entry("some").status, shelf.problem("some").code) == ("error", "blocked")
        assert shelf.entry("some").executor is None
    finally:
        loader.policy = ModulePolicy()
    shelf.bench.run(shelf.catalogue.recheck())
    assert shelf.entry("some").status == "ready"


def test_a_hanging_import_delays_no_other_and_may_be_replaced(shelf: Shelf, root: Path) -> None:
    write(root, "Hangs/agent.py", "import time\ntime.sleep(60)\n")
    write_agent(root, "Good")
    with ThreadPoolExecutor() as pool:
        hanging = pool.submit(shelf.refresh)
        wait_for(lambda: shelf.catalogue.registry.find("good"), what="the good one is served")
        assert not hanging.done()
        write_agent(root, "Hangs", "no longer")
        shelf.refresh(paths={root / "Hangs/agent.py"})
        assert shelf.instructions("hangs") == "no longer"
        hanging.result(30)


def test_refreshes_that_come_together_are_one(shelf: Shelf, root: Path) -> None:
    write_agent(root, "Some")

    async def many() -> list[Any]:
        return await asyncio.gather(*(shelf.catalogue.refresh(force=True) for _ in range(20)))

    reports = shelf.bench.run(many())
    assert len({id(report) for report in reports}) <= 2
    assert [row.id for row in shelf.catalogue.registry.list_entries()] == ["default/some"]
    assert shelf.entry("some").generation == max(row.generation for row in shelf.catalogue.registry.list_entries())


def test_a_file_moved_away_for_a_moment_is_not_lost(shelf: Shelf, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.registry.catalogue._VANISHED_GRACE_S", 1.0)  # the file may be late in coming back
    path = write_agent(root, "Some", "kept")
    shelf.refresh()
    path.rename(path.with_name("agent.py~"))
    timer = threading.Timer(0.03, write_agent, (root, "Some", "kept"))
    timer.start()
    assert shelf.refresh(paths={path}).removed == ()
    timer.join()
    assert all(registry.find("some") for registry in shelf.published)


def test_a_retired_generation_waits_for_its_last_run_then_dies(shelf: Shelf, root: Path) -> None:
    extra = "class Mark: pass\nmark = Mark()\n"
    write_agent(root, "Some", "old", extra=extra)
    shelf.refresh()
    executor: Any = shelf.entry("some").executor
    package = next(name for name in sys.modules if name.startswith("_dropin_") and name.endswith("default_some.agent"))
    mark = weakref.ref(sys.modules[package].__dict__["mark"])
    lease = executor._lease()
    shelf.bench.loop.call_soon_threadsafe(lease.__enter__)
    write_agent(root, "Some", "new", extra=extra)
    shelf.refresh()
    assert shelf.instructions("some") == "new"
    time_to_let_go = time.monotonic() + 1.5
    wait_for(lambda: time.monotonic() > time_to_let_go, what="the hand-over is past")
    assert mark() is not None and package in sys.modules
    shelf.bench.loop.call_soon_threadsafe(lease.__exit__, None, None, None)
    del executor, lease
    shelf.published.clear()
    wait_for(lambda: package not in sys.modules, what="its modules are forgotten")
    wait_for(lambda: gc.collect() >= 0 and mark() is None, what="its objects are gone")


def test_the_ring_of_errors_is_bounded_and_newest_first(shelf: Shelf, root: Path) -> None:
    for number in range(12):
        write(root, f"Bad{number:02}/agent.py", f"raise ValueError({number})\n")
    shelf.refresh()
    errors = shelf.catalogue.recent_errors()
    assert len(errors) == 12
    stamps = [error.occurred_at for error in errors]
    assert shelf.catalogue._errors.maxlen == 200
    assert min(stamps) > time.time() - 60


@contextmanager
def watching(shelf: Shelf, *roots: Path, before: Callable[[], object] = lambda: None, **options: Any) -> Iterator[None]:
    """Watch for the duration of the block; begins when the watch stands. ``before`` is called before it does."""
    reloader = Reloader(replace(shelf.bench.settings, agent_path=roots[0]), shelf.catalogue, roots, **options)
    before()

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(reloader.watch())

    async def end() -> None:
        task.cancel()
        await asyncio.wait({task})

    task = shelf.bench.run(begin())
    try:
        yield
    finally:
        shelf.bench.run(end())


def test_saves_are_served_while_watching(shelf: Shelf, root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_agent(root, "Some", "one")
    with watching(shelf, root):
        wait_for(lambda: shelf.instructions("some") == "one")
        new = write(
            root, "Some/agent.py.new", (root / "Some/agent.py").read_text(encoding="utf-8").replace("one", "two")
        )
        new.replace(root / "Some/agent.py")
        wait_for(lambda: shelf.instructions("some") == "two", what="an atomic save")
        (root / "Some").rename(root / "Renamed")
        wait_for(
            lambda: shelf.catalogue.registry.find("renamed") and not shelf.catalogue.registry.find("some"),
            what="a renamed folder",
        )
        (root / "Renamed/agent.py").unlink()
        wait_for(lambda: not shelf.catalogue.registry.list_entries(), what="a deleted file")


def test_a_root_that_appears_later_and_helpers_elsewhere_are_watched(
    bench: Bench, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path_factory.mktemp("library")
    monkeypatch.syspath_prepend(library)
    write(library, "far_words.py", "TEXT = 'one'\n")
    root = tmp_path.resolve() / "later"
    with bench.catalogue(root) as shelf, watching(shelf, root):
        path = write_agent(root, "Some", extra="import far_words\n")
        path.write_text(path.read_text(encoding="utf-8").replace('"x"', "far_words.TEXT"), encoding="utf-8")
        wait_for(lambda: shelf.instructions("some") == "one")

        def changed() -> bool:
            # Saved again and again: the watch on the new folder stands some time after the load.
            write(library, "far_words.py", "TEXT = 'two'\n")
            return shelf.instructions("some") == "two"

        wait_for(changed)


def test_a_yaml_file_that_changed_while_no_watch_stood_is_read_and_no_other(shelf: Shelf, root: Path) -> None:
    """As between a start and its watch, or while another set of folders comes to be watched."""
    calls: list[str] = []
    config = root.parent / "config"
    config.mkdir()
    write(config, "upstreams.yaml", "version: 1\n")
    write(config, "prices.yaml", "version: 1\n")

    def counting(name: str) -> Callable[[], Awaitable[None]]:
        async def reload() -> None:
            calls.append(name)

        return reload

    names = ("security.yaml", "upstreams.yaml", "prices.yaml")

    def change() -> None:
        write(config, "security.yaml", "version: 1\n")  # new
        (config / "prices.yaml").unlink()

    with watching(shelf, root, before=change, on_change={name: counting(name) for name in names}):
        wait_for(lambda: {"security.yaml", "prices.yaml"} <= set(calls), what="both are read")
    assert "upstreams.yaml" not in calls


def test_yaml_files_call_what_reloads_them(shelf: Shelf, root: Path) -> None:
    calls: list[str] = []
    config = root.parent / "config"
    config.mkdir()

    async def reload_security() -> None:
        calls.append("security")
        raise ConfigError("security.yaml:1: wrong")

    async def reload_upstreams() -> None:
        calls.append("upstreams")

    with watching(shelf, root, on_change={"security.yaml": reload_security, "upstreams.yaml": reload_upstreams}):

        def seen(name: str) -> bool:
            write(config, f"{name}.yaml", f"# {len(calls)} {time.time_ns()}\n")
            return name in calls

        wait_for(lambda: seen("security"))
        wait_for(lambda: seen("upstreams"), what="a failed reload ends nothing")
