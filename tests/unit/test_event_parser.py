"""Server-sent events from raw bytes: every line ending, every split, bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.upstreams.sse import EventParser, EventTooLarge


def parse(*pieces: bytes, limit: int = 1000) -> list[bytes]:
    parser = EventParser(limit)
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\ndata: b\ndata\ndata: c\n\n", [b"a\nb\n\nc"]),
        (b": comment\n\n: another\ndata: a\n: inside\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"data\ndata: a\n\ndata: b\n\n", [b"\na", b"b"]),
        (b"data: a\r\n\rdata: b\n\n\ndata: c\n\n", [b"a", b"b", b"c"]),
        (b"data: a\rdata: b\n\n", [b"a\nb"]),
        (b"data:\n\ndata: \n\ndata\n\n", []),
        (b"data: cut by the end of the stream", []),
        (b"data: no blank line\n", []),
        (b"event: x\n\n", []),
        (b"\n\n\n", []),
        (b"data: \xe2\x82\xac\n\n", ["€".encode()]),
        (b"data: a\x00b\n\n", [b"a\x00b"]),
    ],
)
def test_stream_is_the_same_however_it_is_split(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events
    assert parse(*[stream[i : i + 1] for i in range(len(stream))]) == events
    for at in range(len(stream)):
        assert parse(stream[:at], stream[at:]) == events


@given(st.binary(max_size=200).map(lambda b: b.replace(b"x", b"\n").replace(b"y", b"data: ")), st.data())
def test_any_bytes_are_the_same_however_they_are_split(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parse(*pieces) == parse(stream)


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 2000 + b"\n\n", b"data: " + b"x" * 2000, b":" + b"x" * 2000])
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_line_over_the_limit_is_refused(stream: bytes, size: int) -> None:
    with pytest.raises(EventTooLarge):
        parse(*[stream[i : i + size] for i in range(0, len(stream), size)])


@pytest.mark.parametrize("line", [b"data: 12345678\n", b"data\n"])
def test_event_of_many_lines_over_the_limit_is_refused(line: bytes) -> None:
    with pytest.raises(EventTooLarge):
        parse(*[line] * 2000)


def test_many_events_and_comments_are_no_matter() -> None:
    assert len(parse(*[b"data: 12345678\n\n: comment\n"] * 1000)) == 1000


def test_html_is_strange() -> None:
    parser = EventParser(1000)
    assert parser.feed(b"data: a\n\nid: 1\n: c\n") == [b"a"]
    assert not parser.strange
    parser.feed(b"<html>\n")
    assert parser.strange
