"""One JSON object per line, with its request id, and with nothing in it that should not be."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.observability.logs import (
    EventShape,
    JsonHandler,
    bind_request_id,
    bind_tool,
    clean_text,
    configure_logging,
    keep_out,
    log_context,
    log_event,
)

LOGGER = logging.getLogger("gateway.test")


class Lines:
    def __init__(self) -> None:
        self.stream = io.StringIO()

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def only(self) -> dict[str, Any]:
        (line,) = self.all()
        return line


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Logging as the gateway configures it, and as it was before afterwards."""
    names = ["", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "httpcore", "httpx", "httpx2", "mcp"]
    loggers = [logging.getLogger(name) for name in [*names, "openai", "openai.agents", "watchfiles"]]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    found = Lines()
    configure_logging("info", found.stream)
    yield found
    logging.captureWarnings(False)
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def test_a_line_has_its_fields_in_order_and_leaves_out_what_is_none(lines: Lines) -> None:
    with bind_request_id("req-1"):
        log_event(LOGGER, "tool.invoke", level=logging.WARNING, tool_name="weather", agent_id=None, duration_ms=1.5)
    line = lines.only()
    assert list(line) == [
        "timestamp", "level", "logger", "event", "request_id", "message", "tool_name", "duration_ms",
    ]  # fmt: skip
    assert line["timestamp"].endswith("Z")
    assert len(line["timestamp"]) == len("2026-01-01T00:00:00.000Z")
    assert {k: line[k] for k in ("level", "logger", "event", "request_id", "message")} == {
        "level": "warning",
        "logger": "gateway.test",
        "event": "tool.invoke",
        "request_id": "req-1",
        "message": "tool.invoke",
    }


def test_the_request_id_follows_the_task_and_its_children(lines: Lines) -> None:
    async def one(request_id: str) -> None:
        with bind_request_id(request_id):
            await asyncio.gather(asyncio.create_task(inner()), asyncio.to_thread(log_event, LOGGER, "thread"))

    async def inner() -> None:
        await asyncio.sleep(0)
        log_event(LOGGER, "child")

    async def main() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(main())
    assert sorted((line["event"], line["request_id"]) for line in lines.all()) == [
        ("child", "a"),
        ("child", "b"),
        ("thread", "a"),
        ("thread", "b"),
    ]
    log_event(LOGGER, "outside")
    assert lines.all()[-1]["request_id"] is None


def test_what_an_author_logs_has_the_request_id_too(lines: Lines) -> None:
    with bind_request_id("r"):
        logging.getLogger("an.author").info("looked up %s", "Paris")
    line = lines.only()
    assert (line["message"], line["event"], line["request_id"]) == ("looked up Paris", None, "r")


def test_fields_of_ordinary_records_are_kept(lines: Lines) -> None:
    logging.getLogger("an.author").info("hello", extra={"city": "Paris", "api_key": "sk-secret"})
    line = lines.only()
    assert (line["city"], line["api_key"]) == ("Paris", "***")
    assert set(line) == {"timestamp", "level", "logger", "event", "request_id", "message", "city", "api_key"}


@pytest.mark.parametrize(
    "name",
    ["key", "api_key", "apiKey", "x-api-key", "hashed_key", "token", "access_token", "client_secret", "password",
     "Authorization", "set-cookie", "proxy_authorization_header", "credentials"],
)  # fmt: skip
def test_a_field_named_like_a_secret_is_masked(lines: Lines, name: str) -> None:
    log_event(LOGGER, "x", **{name: "canary"}, nested={"list": [{name: {"deep": "canary"}}]})
    assert "canary" not in lines.stream.getvalue()


@pytest.mark.parametrize(("name", "value"), [("key_id", "alice"), ("max_tokens", 5), ("token", 3), ("keyboard", "de")])
def test_a_field_that_only_sounds_like_one_is_shown(lines: Lines, name: str, value: object) -> None:
    log_event(LOGGER, "x", **{name: value})
    assert lines.only()[name] == value


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer canary-0123",
        "wrong key sk-gw-canary0123456789 given",
        "https://user:canary@host/x",
        "redis://:canary@host:6379/0",
        "token eyJhbGciOiJI.eyJzdWIiOiJjYW5hcnk.canary",
    ],
)
def test_a_secret_is_known_by_its_shape(lines: Lines, text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        log_event(LOGGER, "x", message=text, exc_info=error, detail=text, items=[text])
    logging.getLogger("an.author").warning(text)
    assert "canary" not in lines.stream.getvalue()
    assert "***" in lines.stream.getvalue()


def test_an_exception_is_told_with_its_traceback(lines: Lines) -> None:
    try:
        raise KeyError("city")
    except KeyError as error:
        log_event(LOGGER, "x", level=logging.ERROR, exc_info=error)
        logging.getLogger("an.author").exception("it broke")
    first, second = lines.all()
    assert first["exception"]["type"] == "KeyError"
    assert 'raise KeyError("city")' in first["exception"]["traceback"]
    assert (second["exception"]["type"], second["exception"]["message"]) == ("KeyError", "")
    assert second["exception"]["traceback"].endswith("KeyError\n")


def test_the_texts_of_exceptions_are_there_when_asked_for(lines: Lines) -> None:
    configure_logging("info", lines.stream, exception_text=True)
    log_event(LOGGER, "x", exc_info=KeyError("city"))
    assert lines.only()["exception"] == {"type": "KeyError", "message": "'city'", "traceback": "KeyError: 'city'\n"}


def test_of_the_texts_of_exceptions_only_our_own_and_the_systems_are_shown(lines: Lines) -> None:
    def fail() -> None:
        try:
            try:
                raise ValueError("canary-inner")
            except ValueError as inner:
                raise OSError(111, "Connect call failed") from inner
        except OSError:
            raise GatewayError("Say it again.")  # noqa: B904 - the context is what is tested

    try:
        fail()
    except GatewayError as error:
        log_event(LOGGER, "x", exc_info=error)
    log_event(LOGGER, "y", exc_info=ExceptionGroup("canary-group", [RuntimeError("canary-member")]))
    log_event(LOGGER, "z", exc_info=OSError("canary-os"))
    first, group, odd = (line["exception"] for line in lines.all())
    assert first["message"] == "Say it again."
    order = [first["traceback"].index(text) for text in ("ValueError\n", "Errno 111] Connect", "GatewayError: Say")]
    assert order == sorted(order) and first["traceback"].count("in fail") == 3
    assert "RuntimeError" in group["traceback"] and odd["message"] == ""
    assert "canary" not in lines.stream.getvalue().replace('raise ValueError(\\"canary-inner\\")', "")


def test_no_text_can_end_a_line_or_drive_a_terminal(lines: Lines) -> None:
    log_event(LOGGER, "x", user_agent='a\n{"level":"fake"}\x1b[31m\x9b31m\u202e\u2028\x00\ud800')
    (raw,) = lines.stream.getvalue().splitlines()
    assert raw.isprintable()
    assert json.loads(raw)["level"] == "info"


def test_long_and_deep_values_are_cut(lines: Lines) -> None:
    deep: Any = "end"
    for _ in range(20):
        deep = {"in": deep}
    log_event(LOGGER, "x", text="y" * 5_000, items=list(range(500)), deep=deep)
    line = lines.only()
    assert line["text"] == "y" * 2_000 + "… (3000 more characters)"
    assert len(line["items"]) == 50
    assert line["deep"] == {"in": {"in": {"in": {"in": "…"}}}}


def test_odd_values_become_text(lines: Lines) -> None:
    log_event(LOGGER, "x", ratio=float("nan"), when=object, raw=b"\xff", flag=True, level_=1)
    line = lines.only()
    assert (line["ratio"], line["when"], line["raw"], line["flag"]) == (None, "<class 'object'>", "b'\\xff'", True)


def test_a_field_cannot_take_the_place_of_the_lines_own(lines: Lines) -> None:
    log_event(LOGGER, "x", timestamp="never", request_id="other")
    line = lines.only()
    assert (line["request_id"], line["field_request_id"], line["field_timestamp"]) == (None, "other", "never")


def test_uvicorn_speaks_json_and_leaves_its_access_log_out(lines: Lines) -> None:
    logging.getLogger("uvicorn.error").info("Application startup complete.")
    logging.getLogger("uvicorn.access").info("GET /")
    assert lines.only()["logger"] == "uvicorn.error"
    assert not logging.getLogger("uvicorn.access").propagate


def test_chatty_libraries_stay_quiet_even_at_debug(lines: Lines) -> None:
    configure_logging("debug", lines.stream)
    for name in ("openai.agents", "httpx", "mcp", "asyncio"):
        logging.getLogger(name).info("the whole prompt")
    logging.getLogger("gateway.x").debug("heard")
    assert [line["message"] for line in lines.all()] == ["heard"]


def test_warnings_are_lines_too(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old ways", stacklevel=1)
        logging.captureWarnings(False)
    assert "old ways" in lines.only()["message"]


def test_configuring_twice_writes_once(lines: Lines) -> None:
    configure_logging("info", lines.stream)
    log_event(LOGGER, "x")
    assert len(lines.all()) == 1


def test_a_closed_stream_costs_the_line_and_nothing_else() -> None:
    stream = io.StringIO()
    stream.close()
    JsonHandler(stream).emit(logging.LogRecord("a", logging.INFO, "", 0, "lost", (), None))


def test_a_quiet_level_builds_nothing(lines: Lines) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("must not be asked")

    log_event(LOGGER, "x", level=logging.DEBUG, value=Costly())
    assert lines.all() == []


def test_clean_text_leaves_ordinary_text_alone() -> None:
    assert clean_text("Grüße aus 東京 🎌, task-12") == "Grüße aus 東京 🎌, task-12"


def test_what_is_known_of_a_request_is_on_its_lines_and_a_lines_own_word_counts_first(lines: Lines) -> None:
    log_event(LOGGER, "before")
    with bind_request_id("req-1", "whole-7") as context:
        context.endpoint, context.agent_id = "/v1/chat/completions", "default/a"
        with bind_tool("weather"):
            log_event(LOGGER, "within")
        log_event(LOGGER, "after", agent_id="default/b")
    assert log_context() is None
    before, within, after = lines.all()
    names = ("request_id", "correlation_id", "endpoint", "agent_id", "tool_name")
    assert [before.get(name) for name in names] == [None] * 5
    assert [within.get(name) for name in names] == ["req-1", "whole-7", "/v1/chat/completions", "default/a", "weather"]
    assert [after.get(name) for name in names] == ["req-1", "whole-7", "/v1/chat/completions", "default/b", None]


@pytest.mark.anyio
async def test_two_hundred_requests_at_once_share_no_word(lines: Lines) -> None:
    async def tool(number: int, name: str) -> None:
        with bind_tool(f"{name}-{number}"):
            await asyncio.sleep(0)
            await asyncio.to_thread(log_event, LOGGER, "in.tool", own=f"{name}-{number}", number=number)

    async def request(number: int) -> None:
        with bind_request_id(f"r-{number}", f"c-{number}") as context:
            await asyncio.sleep(0)
            context.endpoint = f"/e/{number}"
            await asyncio.gather(tool(number, "a"), tool(number, "b"))
            context.agent_id = f"g-{number}"
            await asyncio.sleep(0)
            log_event(LOGGER, "in.request", number=number)

    await asyncio.gather(*(request(number) for number in range(200)))
    found = lines.all()
    assert len(found) == 600
    for line in found:
        number = line["number"]
        assert (line["request_id"], line["correlation_id"]) == (f"r-{number}", f"c-{number}")
        assert line["endpoint"] == f"/e/{number}"
        assert line.get("tool_name") == line.get("own")
        assert line.get("agent_id") == (f"g-{number}" if line["event"] == "in.request" else None)


def test_lines_of_every_call_are_written_together_and_before_a_warning(lines: Lines) -> None:
    shape = EventShape(LOGGER, "call.ended", "path", "status", foreign=("path",))
    _nobody_else_listens()

    async def main() -> None:
        with bind_request_id("req-1"):
            shape.log(["/a\x85b", 200])
            await asyncio.sleep(0)
            assert lines.all() == []
            shape.log(["/c", None], logging.WARNING)

    asyncio.run(main())
    first, second = lines.all()
    assert list(first) == ["timestamp", "level", "logger", "event", "request_id", "message", "path", "status"]
    assert (first["level"], first["path"], first["status"]) == ("info", "/a\\u0085b", 200)
    assert (second["level"], second["path"], second["message"]) == ("warning", "/c", "call.ended")
    assert "status" not in second


def _nobody_else_listens() -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if isinstance(handler, JsonHandler)]


def test_whoever_else_listens_hears_the_lines_of_every_call(lines: Lines) -> None:
    shape = EventShape(LOGGER, "call.ended", "path")
    root, handler = logging.getLogger(), logging.NullHandler()
    heard: list[str] = []
    handler.handle = lambda record: bool(heard.append(record.getMessage()))  # type: ignore[method-assign, func-returns-value]
    _nobody_else_listens()
    with bind_request_id("req-1"):
        shape.log(["/a"])
        root.addHandler(handler)
        try:
            shape.log(["/b"])
        finally:
            root.removeHandler(handler)
        shape.log(["/c"])
    assert heard == ["call.ended"]
    assert [line["path"] for line in lines.all()] == ["/a", "/b", "/c"]


def test_text_for_a_terminal_says_the_same_and_nothing_more(lines: Lines) -> None:
    configure_logging("info", lines.stream, as_text=True)
    with bind_request_id("req-1"):
        log_event(LOGGER, "tool.invoke", level=logging.WARNING, tool_name="weather", agent_id=None, duration_ms=1.5)
        log_event(LOGGER, "a.b", message="it\nsays\x1b[2J", note="two words", token="zq", items=[1, "x"], key_id="k=1")
        LOGGER.error("Bearer %s", "abcdefgh")
    text = lines.stream.getvalue()
    first, second, third = [line.partition("Z ")[2] for line in text.splitlines()]
    assert first == "WARNING tool.invoke request_id=req-1 tool_name=weather duration_ms=1.5"
    assert second == (
        'INFO    a.b it\\x0asays\\x1b[2J request_id=req-1 note="two words" token=*** items=[1,"x"] key_id="k=1"'
    )
    assert third == "ERROR   gateway.test *** request_id=req-1"


def test_only_the_frames_of_an_exception_have_lines_of_their_own(lines: Lines) -> None:
    configure_logging("info", lines.stream, as_text=True)
    text = "-".join(("zq", "secret"))
    try:
        raise ValueError(text)
    except ValueError as error:
        log_event(LOGGER, "x.failed", level=logging.ERROR, exc_info=error)
    first, *frames = lines.stream.getvalue().splitlines()
    assert first.endswith("ERROR   x.failed")
    assert frames[-1] == "    ValueError" and all(line.startswith("    ") for line in frames)
    assert "zq-secret" not in lines.stream.getvalue()


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    "word", ["timestamp", "logger", "message", "event", "admin-key", "127.0.0.1", "123456", "size"]
)
def test_what_a_caller_calls_a_secret_takes_nothing_of_a_line_away(lines: Lines, word: str, as_text: bool) -> None:
    configure_logging("info", lines.stream, as_text=as_text)
    with bind_request_id("req-1"):
        keep_out((word,))
        log_event(LOGGER, "x.y", key_id="admin-key", client_ip="127.0.0.1", size=123456, said=f"it is {word}")
    line = lines.stream.getvalue()
    if as_text:
        assert line.endswith(
            'INFO    x.y request_id=req-1 key_id=admin-key client_ip=127.0.0.1 size=123456 said="it is ***"\n'
        )
    else:
        found = lines.only()
        assert (found["event"], found["logger"], found["key_id"]) == ("x.y", "gateway.test", "admin-key")
        assert (found["client_ip"], found["size"], found["said"]) == ("127.0.0.1", 123456, "it is ***")


def test_a_secret_of_a_known_shape_is_masked_to_its_end(lines: Lines) -> None:
    secret = "sk-" + "a" * 20 + '/the"rest'
    with bind_request_id(f"of {secret}", f"part of {secret}"):
        keep_out((secret,))
        try:
            raise GatewayError(f"refused {secret}")
        except GatewayError as error:
            log_event(LOGGER, "x.y", message=f"It is {secret}.", names=[{secret: secret}], exc_info=error)
    text = lines.stream.getvalue()
    assert "/the" not in text and "rest" not in text
    found = lines.only()
    assert (found["message"], found["names"]) == ("It is ***.", [{"***": "***"}])
    assert (found["request_id"], found["correlation_id"]) == ("of ***", "part of ***")
    with bind_request_id("req-2"):
        log_event(LOGGER, "x.y", message="It is sk-" + "a" * 20 + '/the"rest.')
    assert lines.all()[-1]["message"] == 'It is ***/the"rest.', "another request knows nothing of it"
