"""What an upstream's refusal means to the caller: its status, headers and error object as one `GatewayError`."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.errors import (
    GatewayError,
    LentKeyRefused,
    UpstreamAuthFailed,
    UpstreamError,
    UpstreamMalformed,
    UpstreamModelNotFound,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from gateway.upstreams.relaying import shown_headers

LONGEST_WAIT_S = 86_400.0
"""A ``retry-after`` beyond a day is taken for nonsense."""

_LONGEST_MESSAGE = 2_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_CODE = re.compile(r"^[A-Za-z0-9_.:-]{1,64}$")
_INTACT = frozenset({400, 413, 422, 429})
"""Refusals of what the client sent, or of how often: the upstream's own error object says it best."""

_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "credit_balance_exhausted"})
_CONTEXT_LENGTH = re.compile(
    r"maximum context length|context length of|exceeds? the (available )?context|context (window|size) .{0,40}exceed",
    re.IGNORECASE,
)


class Complaint:
    """What an upstream's error object says, made safe to repeat: ``secrets`` (our key) are masked."""

    __slots__ = ("code", "message", "original", "param", "status", "type")

    def __init__(self, error: Any, secrets: tuple[str, ...]) -> None:
        fields = error if isinstance(error, dict) else {"message": error}
        message = fields.get("message") or fields.get("detail") or ""
        self.original = _masked(fields, secrets) if isinstance(fields.get("message"), str) else None
        self.message = _clean(message if isinstance(message, str) else "", secrets)
        self.param = _word(fields.get("param"), _LONGEST_MESSAGE, secrets)
        self.type = _word(fields.get("type"), 64, secrets)
        code = fields.get("code")
        self.status = _status(code) or _status(fields.get("status"))
        self.code = code if isinstance(code, str) and _CODE.match(code) and _status(code) is None else None
        if self.code is None and _is_context_length(self.type, self.message):
            self.code = "context_length_exceeded"

    @classmethod
    def of_body(cls, body: bytes, secrets: tuple[str, ...]) -> Complaint:
        """Read OpenAI's ``{"error": {…}}``, FastAPI's ``{"detail": …}`` or a bare error object; else say nothing."""
        try:
            data = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            data = None
        if not isinstance(data, dict):
            return cls({}, secrets)
        return cls(data.get("error") or data, secrets)


def failure_of_status(
    name: str,
    status: int,
    headers: Mapping[bytes, bytes],
    body: bytes,
    *,
    asked: bytes,
    secrets: tuple[str, ...],
    lent_in: str | None = None,
) -> GatewayError:
    """Map an answer with a status other than 2xx; ``asked`` is the body that was sent.

    ``lent_in`` is the header in which the caller lent the key of this call; None: it was the gateway's own.
    """
    if 300 <= status < 400:
        return UpstreamError(
            f"The upstream '{name}' answered with a redirect ({status}), which is not followed. Set its base_url to "
            "the final address.",
            should_retry=False,
        )
    complaint = Complaint.of_body(body, secrets)
    failure = _failure(name, status, complaint, retry_after_s(headers), _model_of(asked), lent_in)
    failure.upstream_headers = shown_headers(headers)
    failure.words = complaint.message
    if status in _INTACT:
        failure.upstream_error = complaint.original
    return failure


def failure_of_object(name: str, error: Any, *, secrets: tuple[str, ...], lent_in: str | None = None) -> GatewayError:
    """Map an error object that came with status 200, alone or inside a stream."""
    complaint = Complaint(error, secrets)
    failure = _failure_of_complaint(name, complaint, lent_in)
    failure.words = complaint.message
    return failure


def _failure_of_complaint(name: str, complaint: Complaint, lent_in: str | None) -> GatewayError:
    if complaint.status is not None:
        return _failure(name, complaint.status, complaint, None, None, lent_in)
    if complaint.code == "context_length_exceeded":
        return _rejected(name, 400, complaint)
    if complaint.code == "rate_limit_exceeded" or complaint.code in _QUOTA_CODES:
        return _failure(name, 429, complaint, None, None, lent_in)
    said = f": {complaint.message}" if complaint.message else "; it gave no reason."
    return UpstreamError(f"The upstream '{name}' failed while it answered{said}")


def retry_after_s(headers: Mapping[bytes, bytes]) -> float | None:
    """Return the seconds an upstream asks to wait (``retry-after-ms``, seconds or an HTTP date), if they are sane."""
    milliseconds = _number(headers.get(b"retry-after-ms"))
    text = headers.get(b"retry-after", b"").decode("latin-1").strip()
    seconds = milliseconds / 1000 if milliseconds is not None else _number(text.encode("latin-1"))
    if seconds is None and text:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError, IndexError, TypeError):
            return None
    if seconds is None or not 0 < seconds <= LONGEST_WAIT_S:
        return None
    return seconds


def _failure(
    name: str, status: int, complaint: Complaint, wait_s: float | None, model: str | None, lent_in: str | None
) -> GatewayError:
    said = f" It said: {complaint.message}" if complaint.message else ""
    if status in (400, 413, 422):
        return _rejected(name, status, complaint)
    if status in (401, 403) and lent_in is not None:
        return LentKeyRefused(f"The upstream '{name}' refused the key that you sent in '{lent_in}' ({status}).")
    if status in (401, 403):
        return UpstreamAuthFailed(
            f"The upstream '{name}' refused the gateway's own key ({status}); yours is not at fault. Its operator sets "
            "api_key of this upstream in upstreams.yaml."
        )
    if status == 404:
        asked = f"the model '{model}'" if model else "what was asked for"
        return UpstreamModelNotFound(
            f"The upstream '{name}' does not have {asked}. See models, default_model and aliases in upstreams.yaml, "
            "and whether base_url ends with /v1."
        )
    if status == 407:
        return UpstreamAuthFailed(
            f"The proxy of the upstream '{name}' refused the user name and password (407). Its operator sets them in "
            "proxy of this upstream in upstreams.yaml."
        )
    if status == 408:
        return UpstreamTimeout(f"The upstream '{name}' gave up waiting ({status}).{said}")
    if status == 429:
        spent = complaint.code in _QUOTA_CODES
        what = "has no quota left for this key" if spent else "limits the rate of requests; wait and try again"
        return UpstreamRateLimited(
            f"The upstream '{name}' {what}.{said}",
            code=complaint.code if spent else None,
            retry_after_s=wait_s,
            should_retry=False if spent else None,
        )
    if status == 503:
        return UpstreamUnavailable(
            f"The upstream '{name}' is overloaded or starting; try again soon.{said}", retry_after_s=wait_s
        )
    if status >= 500 or status == 409:
        return UpstreamError(f"The upstream '{name}' failed ({status}).{said or ' Try again.'}", retry_after_s=wait_s)
    if status < 400:
        return UpstreamMalformed(f"The upstream '{name}' answered with status {status}, which has no meaning here.")
    return UpstreamError(f"The upstream '{name}' refused the request ({status}).{said}", should_retry=False)


def _rejected(name: str, status: int, complaint: Complaint) -> UpstreamRejected:
    message = complaint.message or f"The upstream '{name}' refused the request ({status}) and gave no reason."
    return UpstreamRejected(message, status=status, code=complaint.code, param=complaint.param)


def _is_context_length(type_: str | None, message: str) -> bool:
    return type_ == "exceed_context_size_error" or bool(_CONTEXT_LENGTH.search(message))


def _clean(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    text = _CONTROL.sub(" ", text).encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"


def _masked(fields: dict[str, Any], secrets: tuple[str, ...]) -> dict[str, Any] | None:
    text = msgspec.json.encode(fields)
    for secret in secrets:
        text = text.replace(msgspec.json.encode(secret)[1:-1], b"***")
    try:
        masked: dict[str, Any] = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    return masked


def _word(value: Any, longest: int, secrets: tuple[str, ...]) -> str | None:
    return _clean(value, secrets)[:longest] if isinstance(value, str) and value else None


def _status(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599 else None


def _number(text: bytes | None) -> float | None:
    if not text or len(text) > 32 or not re.fullmatch(rb"[0-9]+(\.[0-9]*)?", text.strip()):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


class _Asked(msgspec.Struct):
    model: str | None = None


def _model_of(body: bytes) -> str | None:
    try:
        model = msgspec.json.decode(body, type=_Asked).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _CONTROL.sub(" ", model)[:128] if model else None
