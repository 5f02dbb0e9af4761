"""Forms on their way through: the model is replaced, the bytes of everything else are those of the client."""

from __future__ import annotations

import email.parser
import email.policy
import re

import pytest

from api.relayed.multipart import MODEL_BYTES, FormRewriter, find_boundary
from gateway.errors import InvalidRequest

BOUNDARY = "0123456789abcdef0123456789abcdef"


def part(name: str, value: bytes, extra: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
AUDIO = bytes(range(256)) * 40 + b"\r\n--" + BOUNDARY[:-1].encode() + b"\r\n\r\n--\r\n"


def rewrite(form: bytes, step: int = 1 << 20, boundary: str = BOUNDARY) -> tuple[FormRewriter, bytes]:
    rewriter = FormRewriter(boundary, lambda name: f"<{name}>")
    out = b"".join(rewriter.feed(form[at : at + step]) for at in range(0, len(form), step))
    rewriter.finish()
    return rewriter, out


def fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """Read a form with the standard library's mail parser."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    found = {}
    for item in message.iter_parts():
        name = re.search(r'name="(\w+)"', item["content-disposition"])
        assert name is not None
        found[name.group(1)] = item.get_payload(decode=True)
    return found


@pytest.mark.parametrize("step", [1, 7, 33, 4096, 1 << 20])
def test_the_model_is_replaced_and_the_rest_is_the_clients(step: int) -> None:
    form = part("model", b"up/whisper-1") + part("file", AUDIO, '; filename="a.wav"') + part("language", b"") + END
    rewriter, out = rewrite(form, step)
    assert rewriter.model == "up/whisper-1"
    assert rewriter.growth == 2
    assert len(out) == len(form) + 2
    assert BOUNDARY.encode() not in out.replace(BOUNDARY[:-1].encode() + b"\r\n", b"")
    expected = form.replace(b"up/whisper-1", b"<up/whisper-1>").replace(
        b"--" + BOUNDARY.encode(), b"--" + rewriter.boundary.encode()
    )
    assert out == expected


def test_another_parser_reads_the_same() -> None:
    rewriter, out = rewrite(part("model", b"m") + part("prompt", b"two\r\nlines") + END)
    assert fields(rewriter.content_type, out) == {"model": b"<m>", "prompt": b"two\r\nlines"}


@pytest.mark.parametrize("step", [1, 33, 1 << 20])
@pytest.mark.parametrize(
    "header", ["Content-Transfer-Encoding: quoted-printable", "Content-Type: text/plain; charset=utf-7", "X-A: b"]
)
def test_another_parser_is_told_of_no_other_way_to_read_the_model(header: str, step: int) -> None:
    """Go's, for one, undoes quoted-printable: ``=67pt-5`` would be ``gpt-5`` there, and +AGcAcAB0-5 in UTF-7, too."""
    form = part("model", b"=67pt-5").replace(b"\r\n\r\n", f"\r\n{header}\r\n\r\n".encode(), 1) + END
    rewriter, out = rewrite(part("prompt", b"x") + form, step)
    assert rewriter.model == "=67pt-5"
    assert rewriter.growth is not None and len(out) == len(part("prompt", b"x") + form) + rewriter.growth
    assert header.encode() not in out
    assert fields(rewriter.content_type, out)["model"] == b"<=67pt-5>"


def test_a_form_may_have_no_model() -> None:
    rewriter, _ = rewrite(part("prompt", b"x") + END)
    assert rewriter.model is None


def test_a_boundary_that_could_be_guessed_is_not_kept() -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--'
    rewriter, out = rewrite(form, boundary="b")
    assert rewriter.growth is None
    assert len(rewriter.boundary) == 32
    assert fields(rewriter.content_type, out) == {"model": b"<m>"}


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (part("model", b"a") + part("model", b"b") + END, "more than once"),
        (part("model", b"a", '; filename="x"') + END, "plain text"),
        (part("Model", b"a") + END, "write 'model'"),
        (part("model[]", b"a") + END, "write 'model'"),
        (part(" model ", b"a") + END, "write 'model'"),
        (part("model", b"a", '; name="other"') + END, "no proper name"),
        (part("other", b"a", "; name*=utf-8''model") + END, "no proper name"),
        (part("mod\\el", b"a") + END, "no proper name"),
        (part("model", b"x" * (MODEL_BYTES + 1)) + END, "too long"),
        (part("model", b"\xff") + END, "not valid UTF-8"),
        (b"preamble\r\n" + part("model", b"a") + END, "does not begin"),
        (part("model", b"a"), "ends before its last boundary"),
        (part("model", b"a") + END + b"more", "something follows"),
        (part("model", b"a") + END[:-1], "ends before its last boundary"),
        (part("model", b"a") + END.replace(b"--\r\n", b" \r\n"), "something else than a line end"),
        (f"--{BOUNDARY}\r\n\r\n\r\nx\r\n".encode() + END, "malformed header|no proper"),
        (f"--{BOUNDARY}\r\nContent-Type: a/b\r\n\r\nx\r\n".encode() + END, "no proper Content-Disposition"),
        (part("a", b"", '\r\nContent-Disposition: form-data; name="model"') + END, "no proper Content-Disposition"),
        (part("a", b"", '\nContent-Disposition: form-data; name="model"') + END, "malformed header"),
        (part("a", b"", "\r\nX: " + "y" * 9_000) + END, "too long"),
        (b"", "ends before"),
    ],
)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_what_could_be_read_in_two_ways_is_refused(form: bytes, sentence: str, step: int) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        rewrite(form, step)


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", "abc"),
        ('Multipart/Form-Data; charset=utf-8; boundary="a-b_c"', "a-b_c"),
        ("multipart/form-data", None),
        ("multipart/form-data; boundary=", None),
        ("multipart/form-data; boundary=a; boundary=b", None),
        ("multipart/form-data; boundary=a b", None),
        ("multipart/form-data; boundary=" + "x" * 71, None),
    ],
)
def test_boundary(content_type: str, boundary: str | None) -> None:
    if boundary is not None:
        assert find_boundary(content_type) == boundary
        return
    with pytest.raises(InvalidRequest, match="one boundary"):
        find_boundary(content_type)
