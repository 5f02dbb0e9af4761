"""Structured logs: one JSON object (or readable text) per line on stderr, with the request id of whoever caused it.

Every line holds ``timestamp, level, logger, event, request_id, message`` and then the event's own fields. Stderr,
because stdout belongs to what a person asked the command line for. Secrets are masked by the name of their field and
by their shape, long values are cut, and control characters cannot end a line or drive a terminal.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
import traceback
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from contextvars import ContextVar, Token
from functools import lru_cache
from typing import Any, TextIO

import msgspec

from gateway.caller_context import masked
from gateway.errors import GatewayError

_MASK = "***"
_LONGEST_TEXT = 2_000
_LONGEST_TRACEBACK = 16_000
_MOST_ITEMS = 50
_SHORT = 160
_MOST_SCRUBBED = 2_048
_TOGETHER_S = 0.1
_OWN_NAMES = frozenset({"key_id", "client_ip", "run_id"})
"""Fields with words of the gateway's own: a caller that lends such a word as a secret does not hide who it is."""
_DEEPEST = 4
_FEW = 5

_QUIET = (
    "asyncio", "h2", "hpack", "httpcore", "httpcore2", "httpx", "httpx2", "mcp", "openai", "openai.agents",
    "opentelemetry", "psycopg", "python_multipart", "redis", "requests", "sqlalchemy", "urllib3", "watchfiles",
)  # fmt: skip
"""Libraries whose info and debug lines hold prompts, URLs, values of rows or noise: heard from WARNING on only."""

_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_SECRET_NAMES = frozenset(
    {"key", "apikey", "token", "secret", "password", "passwd", "passphrase", "authorization", "cookie", "credential",
     "credentials"}
)  # fmt: skip
_SECRET_SHAPES = re.compile(
    r"(?i:\b(?:bearer|basic)\s+)[\w.~+/=-]{4,}"  # an authorization header
    r"|\b(?:sk|pk|gw|agw|ghp|xox[a-z])[-_][\w-]{12,}"  # keys with a well-known prefix
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"  # a JSON web token
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"  # user and password in a URL; Redis takes one without a user
)
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What JSON leaves as it is and a terminal or a log viewer may obey; below U+0020 JSON escapes by itself."""


_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}
_CONTROL = re.compile("[\x00-\x1f]")
_BARE = re.compile(r"[^\s\"=\x00-\x1f\[{]+")
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(decimal_format="number").encode
_ROOT = logging.getLogger()


class LogContext:
    """What every line of one request says; ``endpoint`` (the route's template) and ``agent_id`` come as they are known.

    ``correlation_id`` is the caller's own word for what the request is a part of, over several requests. ``secrets``
    are texts that stand in no line.
    """

    SHOWN = ("correlation_id", "endpoint", "agent_id", "tool_name")
    """What a line says beside the request's id, where it is known."""

    __slots__ = ("agent_id", "correlation_id", "endpoint", "request_id", "secrets", "tool_name")

    def __init__(self, request_id: str, correlation_id: str | None = None) -> None:
        self.request_id, self.correlation_id = request_id, correlation_id
        self.endpoint: str | None = None
        self.agent_id: str | None = None
        self.tool_name: str | None = None
        self.secrets: tuple[str, ...] = ()

    def fill(self, line: dict[str, Any]) -> None:
        """Add what is known to a line that does not say it itself."""
        if self.correlation_id is not None:
            line.setdefault("correlation_id", without_secrets(self.correlation_id))
        if self.endpoint is not None:
            line.setdefault("endpoint", self.endpoint)
        if self.agent_id is not None:
            line.setdefault("agent_id", self.agent_id)
        if self.tool_name is not None:
            line.setdefault("tool_name", self.tool_name)


_CONTEXT: ContextVar[LogContext | None] = ContextVar("gateway_log_context", default=None)


class bind_request_id:
    """Put a request's ids on every line logged inside ``with``, by this task and by the tasks and threads it starts."""

    __slots__ = ("_context", "_token")
    _token: Token[LogContext | None]

    def __init__(self, request_id: str, correlation_id: str | None = None) -> None:
        self._context = LogContext(request_id, correlation_id)

    def __enter__(self) -> LogContext:
        self._token = _CONTEXT.set(self._context)
        return self._context

    def __exit__(self, *_: object) -> None:
        _CONTEXT.reset(self._token)


class bind_tool:
    """Put a tool's name on every line logged inside ``with``; calls of one request that overlap keep their own."""

    __slots__ = ("_name", "_token")
    _token: Token[LogContext | None] | None

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> LogContext | None:
        outer, self._token = _CONTEXT.get(), None
        if outer is None:
            return None
        inner = LogContext(outer.request_id, outer.correlation_id)
        inner.endpoint, inner.agent_id, inner.tool_name = outer.endpoint, outer.agent_id, self._name
        inner.secrets = outer.secrets
        self._token = _CONTEXT.set(inner)
        return inner

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _CONTEXT.reset(self._token)


def log_context() -> LogContext | None:
    """Return what the lines of the current request say; None outside of one."""
    return _CONTEXT.get()


def keep_out(secrets: tuple[str, ...]) -> None:
    """Mask these texts on every line and span of the current request from now on."""
    context = _CONTEXT.get()
    if context is not None:
        context.secrets = secrets


def without_secrets(text: str) -> str:
    """Return ``text`` with what `keep_out` was given for the current request masked."""
    context = _CONTEXT.get()
    return text if context is None or not context.secrets else masked(text, context.secrets)


def log_event(
    logger: logging.Logger,
    event: str,
    *,
    level: int = logging.INFO,
    message: str | None = None,
    exc_info: BaseException | None = None,
    **fields: Any,
) -> None:
    """Log one event with its fields; ``event`` is ``subsystem.object.verb``.

    Fields that are None are left out, and so is ``quote``, the words of somebody else, unless the texts of exceptions
    are asked for. ``exc_info`` adds type and traceback, and the text of exceptions where that is
    asked for, or where it is our own or the system's.
    """
    if not logger.isEnabledFor(level):
        return
    handler = _only_handler(logger)
    if handler is None:
        logger.handle(_EventRecord(logger.name, level, event, message or event, exc_info, fields))
    else:
        handler.write(
            _line(time.time(), level, logger.name, event, message or event, exc_info, fields, handler.exception_text),
            at_once=level >= logging.WARNING,
        )


class EventShape:
    """An event that every call logs, with fields that are always the same: put together and encoded in one go.

    Its lines are those of `log_event`. ``foreign`` are the fields with text that others chose, which is cleaned; the
    rest holds numbers, and words of the gateway's own.
    """

    __slots__ = ("_event", "_foreign", "_handler", "_heads", "_heard", "_logger", "_make", "_names")

    def __init__(self, logger: logging.Logger, event: str, *names: str, foreign: Collection[str] = ()) -> None:
        self._logger, self._event, self._names = logger, event, names
        self._foreign = tuple(index for index, name in enumerate(names) if name in foreign)
        fields: list[Any] = [(name, Any, None) for name in (*names, *LogContext.SHOWN)]
        ids = [("request_id", str), ("message", str)]
        self._make: Any = msgspec.defstruct("Line", [*ids, *fields], omit_defaults=True)
        self._heads = _Heads(logger.name, event)
        self._handler: JsonHandler | None = None
        self._heard: list[logging.Handler] = []

    def log(self, values: list[Any], level: int = logging.INFO) -> None:
        """Log the event; ``values`` are those of its fields, in order, None for one that is left out."""
        logger, event = self._logger, self._event
        if not logger.isEnabledFor(level):
            return
        # Who hears the logger is found anew only once the root's handlers have changed.
        if _ROOT.handlers != self._heard or logger.handlers or logger.filters or logger.parent is not _ROOT:
            self._handler, self._heard = _only_handler(logger), list(_ROOT.handlers)
        handler, context = self._handler, _CONTEXT.get()
        if handler is None or context is None or context.secrets:
            log_event(logger, event, level=level, **dict(zip(self._names, values, strict=True)))
            return
        for index in self._foreign:
            text = values[index]
            if text is not None:
                values[index] = _SCRUBBED[text]
        line = self._make(
            context.request_id,
            event,
            *values,
            context.correlation_id,
            context.endpoint,
            context.agent_id,
            context.tool_name,
        )
        text = f'{{"timestamp":"{_timestamp(time.time())}{self._heads[level]}{_encode(line)[1:].decode()}\n'
        if level >= logging.WARNING:
            handler.write(text)
        else:
            handler.write_later(text)


class _Heads(dict[int, str]):
    """What stands between the time and the ids in the lines of one event, by level."""

    def __init__(self, logger: str, event: str) -> None:
        super().__init__()
        self._tail = f'","logger":"{logger}","event":"{event}",'

    def __missing__(self, level: int) -> str:
        self[level] = text = f'","level":"{_level_name(level)}{self._tail}'
        return text


def configure_logging(
    level: str = "info", stream: TextIO | None = None, *, exception_text: bool = False, as_text: bool = False
) -> logging.Handler:
    """Send every logger of the process, uvicorn's included, through one JSON handler, and return it.

    ``as_text``: lines are for people instead. ``exception_text``: lines may hold the texts of exceptions, which quote
    prompts and secrets at times. Calling it again replaces the handler. uvicorn's access log is switched off:
    ``http.request`` takes its place.
    """
    handler = JsonHandler(stream, exception_text=exception_text, as_text=as_text)
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, JsonHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # without any handler uvicorn skips its access log altogether
    logging.getLogger("uvicorn.error").addFilter(_NO_ECHO)  # added once, however often
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    logging.captureWarnings(True)
    return handler


class _NoEcho(logging.Filter):
    """Drops what uvicorn says of an answer that was cut: a line of the gateway's own has the reason."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != "ASGI callable returned without completing response."


_NO_ECHO = _NoEcho()


class JsonHandler(logging.Handler):
    """Writes each record as one JSON line, or as text made of that; a closed or full stream loses lines, no request.

    Events below WARNING that are logged inside an event loop are written once it has gone round, together, and those
    that every call logs within a tenth of a second: a system call for each line would cost more than the line.
    """

    def __init__(self, stream: TextIO | None = None, *, exception_text: bool = False, as_text: bool = False) -> None:
        super().__init__()
        self.exception_text = exception_text
        self._as_text = as_text
        self._stream = stream
        self._pending: list[str] = []
        self._due: asyncio.AbstractEventLoop | None = None
        self._due_later: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.write(format_record(record, exception_text=self.exception_text))

    def write(self, line: str, *, at_once: bool = True) -> None:
        """Write a line, newline included, behind those that wait."""
        self._pending.append(line)
        loop = None if at_once else asyncio._get_running_loop()
        if loop is None:
            self.flush()
        elif self._due is not loop:
            self._due = loop
            loop.call_soon(self.flush)

    def write_later(self, line: str) -> None:
        """Write a line, newline included, together with those of the next tenth of a second."""
        self._pending.append(line)
        if self._due_later is None or self._due_later.is_closed():
            loop = asyncio._get_running_loop()
            if loop is None:
                self.flush()
            else:
                self._due_later = loop
                loop.call_later(_TOGETHER_S, self.flush)

    def flush(self) -> None:
        """Write what waits."""
        with self.lock or nullcontext():
            self._due = self._due_later = None
            pending, self._pending = self._pending, []
            if not pending:
                return
            stream = self._stream or sys.stderr
            try:
                stream.write("".join(map(readable, pending) if self._as_text else pending))
                stream.flush()
            except (OSError, ValueError):
                return


def format_record(record: logging.LogRecord, *, exception_text: bool = False) -> str:
    """Return the JSON line of a record, newline included; see `configure_logging`."""
    if isinstance(record, _EventRecord):
        event, fields = record.event, record.fields
    else:
        event, fields = None, {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
    error = record.exc_info[1] if record.exc_info else None
    return _line(record.created, record.levelno, record.name, event, record.getMessage(), error, fields, exception_text)


def readable(line: str) -> str:
    """Return a JSON line as text for people: time, level, event, what is said, then the fields as ``name=value``.

    It is made of the finished line, so that nothing is in it that the JSON would not hold. What a value holds cannot
    begin a line of its own: only the frames of an exception have further lines, indented.
    """
    fields: dict[str, Any] = _decode(line)
    stamp, level = fields.pop("timestamp"), fields.pop("level")
    event, message = fields.pop("event", None), fields.pop("message", "")
    logger, error = fields.pop("logger"), fields.pop("exception", None)
    words = [stamp, f"{level.upper():<7}", event or logger]
    if message != event:
        words.append(_plain(message))
    words += [f"{name}={_value(value)}" for name, value in fields.items() if value is not None]
    lines = [" ".join(words)]
    if isinstance(error, dict):
        lines += [f"    {_plain(frame)}" for frame in error["traceback"].splitlines()]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _value(value: Any) -> str:
    """Return a value as it needs no quotes, else as JSON."""
    return value if isinstance(value, str) and _BARE.fullmatch(value) else _encode(value).decode()


def _only_handler(logger: logging.Logger) -> JsonHandler | None:
    """Return the JSON handler if nobody else listens to a logger: then no record has to be made."""
    if logger.filters:
        return None
    found: JsonHandler | None = None
    heard: logging.Logger | None = logger
    while heard is not None:
        for handler in heard.handlers:
            if found is not None or type(handler) is not JsonHandler or handler.filters or handler.level:
                return None
            found = handler
        heard = heard.parent if heard.propagate else None
    return found


def _line(
    created: float,
    level: int,
    logger: str,
    event: str | None,
    message: str,
    error: BaseException | None,
    fields: Mapping[str, Any],
    exception_text: bool = False,
) -> str:
    context = _CONTEXT.get()
    lent = context is not None and bool(context.secrets)
    line: dict[str, Any] = {
        "timestamp": _timestamp(created),
        "level": _level_name(level),
        "logger": logger,
        "event": event,
        "request_id": without_secrets(context.request_id) if context is not None else None,
        "message": event if message is event else clean_text(message),
    }
    for name, value in fields.items():
        if value is None or (name == "quote" and not exception_text):
            continue
        if name in line:
            name = f"field_{name}"
        kind = type(value)
        if kind is int or kind is float or kind is bool:
            line[name] = value
        elif kind is str and not _is_secret(name):
            # Letters and digits alone are no secret's shape.
            if value.isalnum() and len(value) <= _SHORT and not lent:
                line[name] = value
            else:
                line[name] = _SCRUBBED[value] if name in _OWN_NAMES else clean_text(value)
        else:
            line[name] = _clean(name, value, 0)
    if context is not None:
        context.fill(line)
    if error is not None:
        line["exception"] = _exception(error, exception_text)
    return _encode(line).decode() + "\n"


def _timestamp(created: float) -> str:
    second = int(created)
    return f"{_second(second)}.{int((created - second) * 1000):03d}Z"


def clean_text(text: str, longest: int = _LONGEST_TEXT) -> str:
    """Return ``text`` fit for a log: secrets masked, unsafe characters escaped, cut at ``longest``."""
    text = without_secrets(text)  # before anything is cut or masked by its shape: half of one would not be known again
    return _SCRUBBED[text] if longest == _LONGEST_TEXT else _scrub(text, longest)


def _scrub(text: str, longest: int) -> str:
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text) - longest} more characters)"
    text = _SECRET_SHAPES.sub(_MASK, text)
    if not text.isprintable():
        text = _UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
    return text


@lru_cache(maxsize=8)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class _Scrubbed(dict[str, str]):
    """Texts, fit for a log; short ones are kept: paths, addresses, user agents are the same few on every line."""

    def __missing__(self, text: str) -> str:
        scrubbed = _scrub(text, _LONGEST_TEXT)
        if len(text) <= _SHORT:
            if len(self) >= _MOST_SCRUBBED:
                self.clear()
            self[text] = scrubbed
        return scrubbed


_SCRUBBED = _Scrubbed()


class _EventRecord(logging.LogRecord):
    """A LogRecord without the search for the caller's frame, which costs more than the rest of the line."""

    event: str
    fields: Mapping[str, Any]

    def __init__(
        self,
        name: str,
        level: int,
        event: str,
        message: str,
        error: BaseException | None,
        fields: Mapping[str, Any],
    ) -> None:
        now = time.time()
        self.__dict__.update(
            _BLANK,
            name=name,
            levelno=level,
            levelname=logging.getLevelName(level),
            created=now,
            msecs=now % 1 * 1000,
            msg=message,
            exc_info=(type(error), error, error.__traceback__) if error is not None else None,
            event=event,
            fields=fields,
        )


_BLANK = {
    **logging.LogRecord("", 0, "", 0, "", (), None).__dict__,
    "thread": None,
    "threadName": None,
    "process": None,
    "processName": None,
    "taskName": None,
    "relativeCreated": 0.0,
}
"""The attributes that foreign formatters expect of every record."""


@lru_cache(maxsize=64)
def _level_name(level: int) -> str:
    return logging.getLevelName(level).lower()


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORDS.split(name) if word]
    return bool(words) and (words[-1] in _SECRET_NAMES or "authorization" in words or "password" in words)


def _clean(name: str, value: Any, depth: int) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    if _is_secret(name):
        return _MASK
    if isinstance(value, str):
        return clean_text(value)
    if depth >= _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        items = list(value.items())[:_MOST_ITEMS]
        return {clean_text(str(key)): _clean(str(key), item, depth + 1) for key, item in items}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(name, item, depth + 1) for item in list(value)[:_MOST_ITEMS]]
    return clean_text(str(value))


def _exception(error: BaseException, with_text: bool) -> dict[str, str]:
    if with_text:
        text = "".join(traceback.format_exception(error, limit=-40))
        shown = clean_text(str(error))
    else:
        text, shown = _frames(error), _harmless_text(error)
    return {"type": type(error).__name__, "message": shown, "traceback": clean_text(text, _LONGEST_TRACEBACK)}


def _frames(error: BaseException) -> str:
    """Return where an exception and those before it were raised; of their texts only the harmless."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        text = _harmless_text(current)
        frames = "".join(traceback.format_tb(current.__traceback__, limit=-40))
        parts.append(f"{frames}{type(current).__qualname__}{': ' if text else ''}{text}\n")
        if isinstance(current, BaseExceptionGroup):
            parts += [_frames(inner) for inner in current.exceptions[:_FEW]]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\nwhich led to:\n".join(reversed(parts))


def _harmless_text(error: BaseException) -> str:
    """Return an exception's text if it is our own, or the system's word on a socket, a file or a database."""
    if isinstance(error, GatewayError):
        return clean_text(error.told)
    if isinstance(error, OSError) and error.errno is not None:
        return clean_text(f"[Errno {error.errno}] {error.strerror}")
    if type(error).__name__ == "OperationalError" and type(error).__module__.partition(".")[0] in (
        "psycopg",
        "sqlite3",
    ):
        return clean_text(str(error))
    return ""
