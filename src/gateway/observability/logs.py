"""Structured logs: one JSON object per line on stderr, with the request id of whoever caused it.

Every line holds ``timestamp, level, logger, event, request_id, message`` and then the event's own fields. Stderr,
because stdout belongs to what a person asked the command line for. Secrets are masked by the name of their field and
by their shape, long values are cut, and control characters cannot end a line or drive a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import traceback
from collections.abc import Mapping
from contextvars import ContextVar, Token
from functools import lru_cache
from typing import Any, TextIO

import msgspec

_MASK = "***"
_LONGEST_TEXT = 2_000
_LONGEST_TRACEBACK = 16_000
_MOST_ITEMS = 50
_SHORT = 160
_DEEPEST = 4

_QUIET = ("asyncio", "httpcore", "httpx", "httpx2", "mcp", "openai", "openai.agents", "watchfiles")
"""Libraries whose info and debug lines hold prompts, URLs or noise: heard from WARNING on, whatever the level."""

_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_SECRET_NAMES = frozenset(
    {"key", "apikey", "token", "secret", "password", "passwd", "passphrase", "authorization", "cookie", "credential",
     "credentials"}
)  # fmt: skip
_SECRET_SHAPES = re.compile(
    r"(?i:\b(?:bearer|basic)\s+)[\w.~+/=-]{4,}"  # an authorization header
    r"|\b(?:sk|pk|gw|agw|ghp|xox[a-z])[-_][\w-]{12,}"  # keys with a well-known prefix
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"  # a JSON web token
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password in a URL
)
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What JSON leaves as it is and a terminal or a log viewer may obey; below U+0020 JSON escapes by itself."""

_REQUEST_ID: ContextVar[str | None] = ContextVar("gateway_request_id", default=None)

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}
_encode = msgspec.json.Encoder(decimal_format="number").encode


class bind_request_id:
    """Put a request id on every line logged inside ``with``, by this task and by the tasks and threads it starts."""

    __slots__ = ("_request_id", "_token")
    _token: Token[str | None]

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def __enter__(self) -> None:
        self._token = _REQUEST_ID.set(self._request_id)

    def __exit__(self, *_: object) -> None:
        _REQUEST_ID.reset(self._token)


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

    Fields that are None are left out. ``exc_info`` adds type, text and traceback: it stays on the server.
    """
    if not logger.isEnabledFor(level):
        return
    handler = _only_handler(logger)
    if handler is None:
        logger.handle(_EventRecord(logger.name, level, event, message or event, exc_info, fields))
    else:
        handler.write(_line(time.time(), level, logger.name, event, message or event, exc_info, fields))


def configure_logging(level: str = "info", stream: TextIO | None = None) -> logging.Handler:
    """Send every logger of the process, uvicorn's included, through one JSON handler, and return it.

    Calling it again replaces the handler. uvicorn's access log is switched off: ``http.request`` takes its place.
    """
    handler = JsonHandler(stream)
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, JsonHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # without any handler uvicorn skips its access log altogether
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    logging.captureWarnings(True)
    return handler


class JsonHandler(logging.Handler):
    """Writes each record as one JSON line and flushes it; a closed or full stream loses lines, never the request."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.write(format_record(record))

    def write(self, line: str) -> None:
        """Write a line, newline included."""
        stream = self._stream or sys.stderr
        try:
            stream.write(line)
            stream.flush()
        except (OSError, ValueError):
            return


def format_record(record: logging.LogRecord) -> str:
    """Return the JSON line of a record, newline included."""
    if isinstance(record, _EventRecord):
        event, fields = record.event, record.fields
    else:
        event, fields = None, {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
    error = record.exc_info[1] if record.exc_info else None
    return _line(record.created, record.levelno, record.name, event, record.getMessage(), error, fields)


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
) -> str:
    second = int(created)
    line: dict[str, Any] = {
        "timestamp": f"{_second(second)}.{int((created - second) * 1000):03d}Z",
        "level": _level_name(level),
        "logger": logger,
        "event": event,
        "request_id": _REQUEST_ID.get(),
        "message": event if message is event else clean_text(message),
    }
    for name, value in fields.items():
        if value is None:
            continue
        if name in line:
            name = f"field_{name}"
        kind = type(value)
        if kind is int or kind is float or kind is bool:
            line[name] = value
        elif kind is str and not _is_secret(name):
            # Letters and digits alone are no secret's shape.
            line[name] = value if value.isalnum() and len(value) <= _SHORT else clean_text(value)
        else:
            line[name] = _clean(name, value, 0)
    if error is not None:
        line["exception"] = _exception(error)
    return _encode(line).decode() + "\n"


def clean_text(text: str, longest: int = _LONGEST_TEXT) -> str:
    """Return ``text`` fit for a log: secrets of a known shape masked, unsafe characters escaped, cut at ``longest``."""
    if len(text) > _SHORT:
        return _scrub(text, longest)
    return _scrub_short(text)


def _scrub(text: str, longest: int) -> str:
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text) - longest} more characters)"
    text = _SECRET_SHAPES.sub(_MASK, text)
    if not text.isprintable():
        text = _UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
    return text


@lru_cache(maxsize=2048)
def _scrub_short(text: str) -> str:
    """Paths, addresses, user agents, key ids: the same few texts on every line."""
    return _scrub(text, _LONGEST_TEXT)


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


@lru_cache(maxsize=8)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


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


def _exception(error: BaseException) -> dict[str, str]:
    text = "".join(traceback.format_exception(error, limit=-40))
    return {
        "type": type(error).__name__,
        "message": clean_text(str(error)),
        "traceback": clean_text(text, _LONGEST_TRACEBACK),
    }
