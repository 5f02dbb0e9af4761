"""The SQL store: opened when it is needed, safe to open at once from many sides, clear when it is down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from gateway.config import Settings
from gateway.errors import ConfigError, StoreUnavailable
from gateway.store.store import Store, database_url
from tests.support import store_rooms
from tests.support.databases import BACKENDS, database

ROOM = "tests.support.store_rooms"
NOTES = store_rooms.NOTES


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield database_url(Settings(database_url=found))


def sqlite(folder: Path) -> str:
    return database_url(Settings(state_dir=folder))


async def texts(store: Store) -> list[str | None]:
    async with store.reading() as connection:
        return list((await connection.scalars(select(NOTES.c.text).order_by(NOTES.c.id))).all())


async def write(store: Store, text: str) -> None:
    async with store.transaction() as connection:
        await connection.execute(insert(NOTES).values(text=text))


def test_what_is_written_is_read_by_the_next_process(url: str) -> None:
    async def first() -> None:
        async with Store(url, (ROOM,)) as store:
            assert store.status == "idle"
            await write(store, "kept")
            assert await store.check() == "ready"

    async def second() -> list[str | None]:
        async with Store(url, (ROOM,)) as store:
            return await texts(store)

    asyncio.run(first())
    assert asyncio.run(second()) == ["kept"]


def test_a_block_that_raises_writes_nothing_and_a_violated_constraint_is_the_writers_own_error(url: str) -> None:
    async def work() -> list[str | None]:
        async with Store(url, (ROOM,)) as store:
            await write(store, "one")
            with contextlib.suppress(ZeroDivisionError):
                async with store.transaction() as connection:
                    await connection.execute(insert(NOTES).values(text="two"))
                    raise ZeroDivisionError
            with pytest.raises(IntegrityError):
                await write(store, "one")
            assert store.status == "ready"
            return await texts(store)

    assert asyncio.run(work()) == ["one"]


def test_four_processes_open_an_empty_database_at_once_and_all_write(url: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from gateway.store.store import Store\n"
        "from tests.unit.test_store import ROOM, write\n"
        "async def main():\n"
        "    async with Store(sys.argv[1], (ROOM,)) as store:\n"
        "        await asyncio.gather(*(write(store, f'{sys.argv[2]}-{n}') for n in range(10)))\n"
        "sys.stdin.readline()\n"
        "asyncio.run(main())\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, url, str(number)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": "src:."},
            cwd=Path(__file__).parents[2],
        )
        for number in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, errors

    async def count() -> int:
        async with Store(url, (ROOM,)) as store:
            return len(await texts(store))

    assert asyncio.run(count()) == 40


def test_an_older_database_is_brought_up_once_and_an_older_gateway_refuses_the_newer_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def old() -> None:
        async with Store(url, (ROOM,)) as store:
            await write(store, "kept")

    async def new() -> list[tuple[str | None, str | None]]:
        async with Store(url, (ROOM,)) as store, store.reading() as connection:
            columns = store_rooms.LATER_NOTES.c
            return [tuple(row) for row in await connection.execute(select(columns.text, columns.author))]

    asyncio.run(old())
    monkeypatch.setattr(store_rooms, "SCHEMA", store_rooms.later.SCHEMA)
    assert asyncio.run(new()) == [("kept", None)]
    assert asyncio.run(new()) == [("kept", None)]  # a second start takes no step
    monkeypatch.setattr(store_rooms, "SCHEMA", dataclasses.replace(store_rooms.SCHEMA, steps=()))
    with pytest.raises(ConfigError, match="newer gateway"):
        asyncio.run(old())


def test_a_step_that_fails_leaves_the_database_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(text: str) -> list[str | None]:
        async with Store(url, (ROOM,)) as store:
            await write(store, text)
            return await texts(store)

    def broken(connection: object) -> None:
        store_rooms.add_author(connection)  # type: ignore[arg-type]
        raise RuntimeError("half way")

    assert asyncio.run(use("one")) == ["one"]
    good = store_rooms.SCHEMA
    monkeypatch.setattr(store_rooms, "SCHEMA", dataclasses.replace(good, steps=(broken,)))
    with pytest.raises(RuntimeError, match="half way"):
        asyncio.run(use("two"))
    monkeypatch.setattr(store_rooms, "SCHEMA", store_rooms.later.SCHEMA)
    assert asyncio.run(use("three")) == ["one", "three"]  # the whole step again: its column was not there


def test_a_mistake_in_a_statement_is_no_outage(url: str) -> None:
    async def work() -> str:
        async with Store(url, (ROOM,)) as store:
            with pytest.raises((ProgrammingError, OperationalError)):
                async with store.reading() as connection:
                    await connection.exec_driver_sql("SELECT * FROM nowhere")
            return store.status

    assert asyncio.run(work()) == "ready"


def test_a_server_that_is_down_is_said_at_once_and_tried_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with Store("postgresql+psycopg://127.0.0.1:9/none", (ROOM,)) as store:
            for _ in range(2):
                with pytest.raises(StoreUnavailable) as caught:
                    await texts(store)
                assert caught.value.status == 503
                assert caught.value.retry_after_s == 1
            assert await store.check() == "unavailable"

    asyncio.run(work())


def test_a_folder_that_cannot_be_made_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    async def work() -> None:
        async with Store(sqlite(tmp_path / "file" / "state"), (ROOM,)) as store:
            with pytest.raises(StoreUnavailable, match="GATEWAY_STATE_DIR"):
                await texts(store)

    asyncio.run(work())


def test_a_locked_file_is_an_outage_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.sql._BUSY_MS", 50)

    async def work() -> list[str | None]:
        async with Store(sqlite(tmp_path), (ROOM,)) as store, Store(sqlite(tmp_path), (ROOM,)) as other:
            await write(store, "before")
            async with store.transaction():
                with pytest.raises(StoreUnavailable):
                    await write(other, "refused")
                assert other.status == "unavailable"
                assert await texts(other) == ["before"]  # readers do not wait for a writer
            await write(other, "after")
            assert other.status == "ready"
            return await texts(store)

    assert asyncio.run(work()) == ["before", "after"]


def test_a_cancelled_writer_leaves_no_transaction_open_and_no_connection_in_use(url: str) -> None:
    async def work() -> list[str | None]:
        async with Store(url, (ROOM,)) as store:
            await write(store, "before")
            for number in range(8):  # more often than there are connections
                inside = asyncio.Event()

                async def writer(number: int, inside: asyncio.Event) -> None:
                    async with store.transaction() as connection:
                        await connection.execute(insert(NOTES).values(text=f"lost {number}"))
                        inside.set()
                        await asyncio.Event().wait()

                task = asyncio.create_task(writer(number, inside))
                await asyncio.wait_for(inside.wait(), 60)
                task.cancel()
                await asyncio.wait((task,), timeout=10)
                assert task.cancelled()
            await write(store, "after")
            assert store.status == "ready"
            return await texts(store)

    assert asyncio.run(work()) == ["before", "after"]


def test_a_cancelled_statement_is_stopped_and_its_caller_does_not_wait_for_it(url: str) -> None:
    endless = (
        "SELECT pg_sleep(60)"
        if url.startswith("postgresql")
        else "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    )

    async def work() -> None:
        async with Store(url, (ROOM,)) as store:
            await write(store, "before")
            for _ in range(8):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05), store.reading() as connection:
                        await connection.exec_driver_sql(endless)
            async with asyncio.timeout(40):
                assert await texts(store) == ["before"]

    started = time.monotonic()
    asyncio.run(work())
    assert time.monotonic() - started < 50, "before the statements would have ended by themselves"


def test_a_server_that_hears_nothing_any_more_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gateway.store.connection._STOP_S", 0.05)

    def deaf(*args: object, **options: object) -> None:
        raise OSError("no answer")

    with database("postgresql", tmp_path) as found:

        async def work() -> None:
            async with Store(database_url(Settings(database_url=found)), (ROOM,)) as store:
                await write(store, "before")
                monkeypatch.setattr("psycopg.Connection.cancel_safe", deaf)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05), store.reading() as connection:
                        await connection.exec_driver_sql("SELECT pg_sleep(60)")
                async with asyncio.timeout(40), contextlib.AsyncExitStack() as held:
                    for _ in range(5):  # all there are: none is kept by the statement nobody waits for
                        await held.enter_async_context(store.transaction())

        started = time.monotonic()
        asyncio.run(work())
        assert time.monotonic() - started < 50, "before the statement would have ended by itself"


def test_whoever_gets_no_connection_is_told_so_in_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> list[str | None]:
        async with Store(url, (ROOM,)) as store, contextlib.AsyncExitStack() as held:
            await write(store, "before")
            monkeypatch.setattr("gateway.store.connection.WAIT_S", 0.05)
            connections = 1 if url.startswith("sqlite") else 5
            for _ in range(connections):
                await held.enter_async_context(store.transaction())
            with pytest.raises(StoreUnavailable, match="busy"):
                await write(store, "refused")
            await held.aclose()
            await write(store, "after")
            return await texts(store)

    assert asyncio.run(work()) == ["before", "after"]


def test_many_tasks_share_the_few_connections(url: str) -> None:
    async def work() -> int:
        async with Store(url, (ROOM,)) as store:
            await asyncio.gather(*(write(store, f"text {n}") for n in range(60)), *(texts(store) for _ in range(60)))
            return len(await texts(store))

    assert asyncio.run(work()) == 60


def test_a_store_in_use_imports_no_object_mapper_and_no_bridge_to_another_loop(url: str) -> None:
    script = (
        "import asyncio, json, sys\n"
        "from gateway.store.store import Store\n"
        "from api.bootstrap import STORE_MODULES\n"
        "async def main():\n"
        "    async with Store(sys.argv[1], STORE_MODULES) as store:\n"
        "        await store.open()\n"
        "        assert await store.check() == 'ready'\n"
        "asyncio.run(main())\n"
        "heavy = ('sqlalchemy.orm', 'sqlalchemy.ext.asyncio', 'greenlet', 'aiosqlite')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules] + ['sqlalchemy' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, url], env={"PYTHONPATH": "src"}, capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=True, timeout=300,
    )  # fmt: skip
    assert json.loads(done.stdout) == [True]


def test_the_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with Store(sqlite(tmp_path / "state"), (ROOM,)) as store:
            await write(store, "private")

    asyncio.run(work())
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "gateway.db").stat().st_mode) == 0o600


def test_nothing_is_opened_or_imported_before_somebody_needs_the_store(tmp_path: Path) -> None:
    script = (
        "import asyncio, json, sys\n"
        "import api.main\n"
        "from gateway.store.store import Store\n"
        "async def main():\n"
        "    async with Store(sys.argv[1], ()) as store:\n"
        "        await store.check()\n"
        "asyncio.run(main())\n"
        "heavy = ('sqlalchemy', 'aiosqlite', 'psycopg', 'redis')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, sqlite(tmp_path)], env={"PYTHONPATH": "src"}, capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=True, timeout=300,
    )  # fmt: skip
    assert json.loads(done.stdout) == []
    assert not (tmp_path / "gateway.db").exists()


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres://h/d?sslmode=require", "postgresql+psycopg://h/d?sslmode=require"),
        ("sqlite:////var/gateway.db", "sqlite:////var/gateway.db"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
    ],
)
def test_plain_urls_are_accepted(given: str, made: str) -> None:
    assert database_url(Settings(database_url=given)) == made


@pytest.mark.parametrize(
    "given",
    [
        "mysql://h/d",
        "postgresql+asyncpg://h/d",
        "/var/gateway.db",
        "postgresql://[::1/d",
        "sqlite:///:memory:",
    ],
)
def test_other_urls_are_refused_without_being_repeated(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        database_url(Settings(database_url=given))
    assert "GATEWAY_DATABASE_URL" in caught.value.message
    assert given not in caught.value.message


def test_the_state_folder_stands_beside_the_agents_in_development_and_with_the_platforms_data_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert Settings(agent_path=tmp_path / "agents").state_folder() == tmp_path.resolve() / ".gateway"
    assert Settings(environment="production").state_folder() == tmp_path / "data" / "agent-gateway"
    assert Settings(environment="production", state_dir=tmp_path).state_folder() == tmp_path


def test_why_the_database_cannot_be_had_is_in_the_log_without_its_password(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        settings = Settings(database_url="postgresql://me:canary@127.0.0.1:1/gateway")
        async with Store(database_url(settings), (ROOM,)) as store:
            with pytest.raises(StoreUnavailable) as caught:
                await store.open()
            assert "127.0.0.1" not in caught.value.message, "callers are not told where it is"

    asyncio.run(work())
    (failed,) = [record for record in caplog.records if record.__dict__.get("event") == "store.open.failed"]
    reason = failed.__dict__["fields"]["reason"]
    assert "refused" in reason and "canary" not in reason
