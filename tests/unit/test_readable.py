"""Pages as text: what a reader sees, whatever the page is made of, and which addresses are asked at all."""

from __future__ import annotations

import time

import pytest

from gateway.tools.builtin.pages import PageFailed, checked
from gateway.tools.builtin.readable import readable


@pytest.mark.parametrize(
    ("page", "title", "text"),
    [
        ("<title>A &amp; B</title><body><p>One</p><p>two</p>", "A & B", "One\ntwo"),
        ("<head><title>T</title><style>p{}</style></head><h1>Head</h1>x<br>y", "T", "Head\nx\ny"),
        ("<script>if (a < b) alert('</p>')</script>seen", "", "seen"),
        ("<SCRIPT>hidden</SCRIPT ><p>seen", "", "seen"),
        ("<!-- hidden <p> -->seen<!DOCTYPE html><?xml hidden?>", "", "seen"),
        ("a < b and 3<4 <b>bold</b>", "", "a < b and 3<4 bold"),
        ("<ul><li>one<li>two</ul>", "", "one\ntwo"),
        ("<td>a</td><td>b</td>", "", "a\nb"),
        ("&lt;b&gt; &#228; &#x1F600; &nosuch; &#99999999999; &nbsp;x", "", "<b> ä 😀 &nosuch; &#99999999999; x"),
        ("<svg><title>no</title>hidden</svg>seen<svg/>too", "", "seentoo"),
        ("<p>never closed <script>hidden", "", "never closed"),
        ("İ<script>hidden</script>seen", "", "İseen"),
        ("", "", ""),
        ("<", "", "<"),
        ("<p", "", ""),
        ("  many   \n\n\n  blanks\t here ", "", "many\nblanks here"),
    ],
)
def test_a_page_is_what_a_reader_sees(page: str, title: str, text: str) -> None:
    found = readable(page)
    assert (found.title, found.text) == (title, text)


@pytest.mark.parametrize(
    "piece",
    ["<", "<!--", "<!-", "<script>", "</script", "<a", "<a ", "&", "&#", "&amp", "<p>", "<title>", "<svg", "'", " "],
)
def test_the_time_grows_with_the_length_alone(piece: str) -> None:
    page = piece * (1_000_000 // len(piece))
    started = time.process_time()
    readable(page)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://example.com", "https://example.com/"),
        ("https://example.com/a b?q=ä#part", "https://example.com/a%20b?q=%C3%A4"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("https://example.com/\r\nx: y", "https://example.com/x:%20y"),
    ],
)
def test_an_address_is_made_ready_to_be_sent(url: str, asked: str) -> None:
    assert checked(url) == asked


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com/",
        "file:///etc/passwd",
        "ftp://example.com/",
        "javascript:alert(1)",
        "https://user:word@example.com/",
        "https://example.com:99999/",
        "https://[::1/",
        "https:///path",
    ],
)
def test_what_is_no_address_of_a_page_is_never_asked(url: str) -> None:
    with pytest.raises(PageFailed):
        checked(url)
