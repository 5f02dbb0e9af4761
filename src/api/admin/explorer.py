"""GET /docs: a page that reads the OpenAPI document and tries its calls. Nothing of it comes from another host."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from starlette.responses import Response


async def explorer_response() -> Response:
    """The page, under a policy that allows its own script and style and calls to this gateway, and nothing else."""
    page, policy = _page()
    return Response(page, media_type="text/html", headers={"content-security-policy": policy})


@lru_cache(maxsize=1)
def _page() -> tuple[bytes, str]:
    page = files("api.admin").joinpath("explorer.html").read_bytes()
    script, style = (_hash(page, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(page: bytes, tag: bytes) -> str:
    found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    assert found, f"explorer.html has no <{tag.decode()}>"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found.group(1)).digest()).decode()}'"
