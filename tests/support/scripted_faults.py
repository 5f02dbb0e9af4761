"""How the scripted upstream misbehaves: every fault by name, each given whether the request was streamed."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.support.scripted_answers import (
    FRAME,
    LAST,
    STREAM_HEAD,
    Answer,
    Step,
    Steps,
    chunk,
    completion,
    dump,
    frame,
    sse,
    whole,
)


def fault(name: str) -> Answer:
    """Misbehave: one of `FAULTS`."""
    return Answer(steps=FAULTS[name])


_GOOD = dump(completion(Answer(text="one two three")))
_WORDS = [chunk({"role": "assistant", "content": ""}), chunk({"content": "one"}), chunk({"content": " two"})]
_END = [chunk({}, "stop"), b"[DONE]"]
_HTML = b"<!doctype html><html><body>Welcome</body></html>\n" * 20


def _part_way(*then: Step, body: Sequence[Step] = ()) -> Callable[[bool], Steps]:
    """A stream that begins well and then does ``then``; a whole answer that does ``body`` (default: half of it)."""

    def steps(streamed: bool) -> Steps:
        if streamed:
            return [STREAM_HEAD, *sse(*_WORDS), *then]
        if body:
            return body
        return [whole(200, _GOOD)[: -len(_GOOD) // 2], *(s for s in then if isinstance(s, str))]

    return steps


def _body(data: bytes, *, kind: str = "application/json", code: int = 200, **headers: str) -> Callable[[bool], Steps]:
    given = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return lambda streamed: [whole(code, data, given)]


def _events(*payloads: bytes | Mapping[str, Any], plain: bytes) -> Callable[[bool], Steps]:
    """A whole stream of these events; for a request that is not streamed, a whole body."""
    return lambda streamed: [STREAM_HEAD, *sse(*payloads), LAST] if streamed else [whole(200, plain)]


def _endless(piece: bytes, *, head: bytes = b"", pause_s: float = 0.0) -> Callable[[bool], Steps]:
    def steps(streamed: bool) -> Iterator[Step]:
        yield STREAM_HEAD if streamed else STREAM_HEAD.replace(b"text/event-stream", b"application/json")
        if head:
            yield frame(head)
        for _ in itertools.count():
            yield frame(piece)
            if pause_s:
                yield pause_s

    return steps


def _huge_event(streamed: bool) -> Iterator[Step]:
    """64 MB in one event (or one JSON string), properly ended."""
    begin, end = b'data: {"choices":[{"index":0,"delta":{"content":"', b'"}}]}\n\n'
    yield STREAM_HEAD if streamed else STREAM_HEAD.replace(b"text/event-stream", b"application/json")
    yield frame(begin if streamed else begin[6:])
    for _ in range(1024):
        yield frame(b"x" * 65536)
    yield from (frame(end), *sse(*_END), LAST)


def _bomb(streamed: bool) -> Steps:
    """A few kilobytes that unpack to 64 megabytes."""
    return [whole(200, _packed(), {"content-type": "text/event-stream", "content-encoding": "gzip"})]


@functools.cache
def _packed() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(
        [packer.compress(b"data: ")] + [packer.compress(bytes(65536)) for _ in range(1024)] + [packer.flush()]
    )


_ERROR = {"error": {"message": "CUDA out of memory", "type": "server_error", "param": None, "code": None}}

FAULTS: dict[str, Callable[[bool], Steps]] = {
    "refuse_after_accept": lambda streamed: ["close"],
    "reset_at_once": lambda streamed: ["reset"],
    "hang_before_headers": lambda streamed: ["hang"],
    "hang_in_headers": lambda streamed: [b"HTTP/1.1 200 OK\r\ncontent-ty", "hang"],
    "hang_after_headers": lambda streamed: [
        STREAM_HEAD if streamed else b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n",
        "hang",
    ],
    "hang_part_way": _part_way("hang"),
    "reset_part_way": _part_way("reset"),
    "cut_between_events": _part_way("close"),
    "cut_mid_event": _part_way(sse(_WORDS[1])[0][:40], "close"),
    "cut_in_headers": lambda streamed: [b"HTTP/1.1 200 OK\r\ncontent-type: appl", "close"],
    "no_finish_reason": _events(*_WORDS, b"[DONE]", plain=_GOOD.replace(b'"stop"', b"null")),
    "no_finish_no_done": _events(*_WORDS, plain=_GOOD.replace(b'"finish_reason":"stop"', b'"x":1')),
    "no_events": _events(plain=dump({**FRAME, "choices": []})),
    "empty_body": _body(b"", kind="text/event-stream"),
    "bad_json": _events(*_WORDS, b'{"choices": [{"index": 0, "delta": {', plain=_GOOD[:-3]),
    "bad_utf8": _events(
        *_WORDS, dump(_WORDS[1]).replace(b"one", b"\xff\xfe"), *_END, plain=_GOOD.replace(b"one", b"\xff\xfe")
    ),
    "not_an_object": _events(b"[1]", plain=b'["hello"]'),
    "wrong_shape": _events(b'{"choices":{"a":1}}', plain=b'{"choices":{"a":1}}'),
    "html": _body(_HTML, kind="text/html"),
    "html_unlabelled": _body(_HTML, kind="text/event-stream"),
    "error_object": _events(*_WORDS, _ERROR, plain=dump(_ERROR)),
    "error_object_at_once": _events(_ERROR, plain=dump(_ERROR)),
    "error_object_json": _body(dump(_ERROR)),
    "redirect": _body(b"", code=307, location="http://127.0.0.1:9/v1/chat/completions"),
    "huge_event": _huge_event,
    "endless_line": _endless(b"x" * 65536, head=b"data: "),
    "endless_comment": _endless(b"x" * 65536, head=b": "),
    "endless_headers": lambda streamed: itertools.chain(
        [b"HTTP/1.1 200 OK\r\n"], (b"x-filler-%d: %b\r\n" % (i, b"x" * 4000) for i in itertools.count())
    ),
    "endless_trailers": lambda streamed: itertools.chain(
        [STREAM_HEAD, *sse(*_WORDS), b"0\r\n"], (b"x-filler-%d: %b\r\n" % (i, b"x" * 4000) for i in itertools.count())
    ),
    "gzip_bomb": _bomb,
    "drip": _endless(b"x", head=b"data: ", pause_s=0.02),
    "comments_only": _endless(b": still here\n\n", pause_s=0.02),
    "not_http": lambda streamed: [b"SSH-2.0-OpenSSH_9.6\r\n", "hang"],
    "bad_chunk": _part_way(b"zz\r\nbad\r\n", "hang", body=[STREAM_HEAD, b"zz\r\nbad\r\n", "hang"]),
    "truncated_chunk": _part_way(b"400\r\nshort", "close", body=[STREAM_HEAD, b"400\r\nshort", "close"]),
    "length_and_chunked": lambda streamed: [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + frame(_GOOD) + LAST
    ],
    "switching_protocols": lambda streamed: [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nwhatever",
        "hang",
    ],
}
"""Every way to go wrong, by name."""
