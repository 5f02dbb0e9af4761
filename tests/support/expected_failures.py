"""What each fault of an upstream is to its caller, whichever way the call went out."""

from __future__ import annotations

from gateway import errors

EXPECTED: dict[str, tuple[type[errors.GatewayError], type[errors.GatewayError]]] = {
    # fault: (plain, streamed)
    "refuse_after_accept": (errors.UpstreamUnreachable, errors.UpstreamUnreachable),
    "reset_at_once": (errors.UpstreamUnreachable, errors.UpstreamUnreachable),
    "hang_before_headers": (errors.UpstreamTimeout, errors.UpstreamTimeout),
    "hang_in_headers": (errors.UpstreamTimeout, errors.UpstreamTimeout),
    "hang_after_headers": (errors.UpstreamTimeout, errors.UpstreamTimeout),
    "hang_part_way": (errors.UpstreamTimeout, errors.UpstreamTimeout),
    "reset_part_way": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "cut_between_events": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "cut_mid_event": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "cut_in_headers": (errors.UpstreamUnreachable, errors.UpstreamUnreachable),
    "no_finish_reason": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "no_finish_no_done": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "no_events": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "empty_body": (errors.UpstreamMalformed, errors.UpstreamIncomplete),
    "bad_json": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "bad_utf8": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "not_an_object": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "wrong_shape": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "html": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "html_unlabelled": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "error_object": (errors.UpstreamError, errors.UpstreamError),
    "error_object_at_once": (errors.UpstreamError, errors.UpstreamError),
    "error_object_json": (errors.UpstreamError, errors.UpstreamError),
    "redirect": (errors.UpstreamError, errors.UpstreamError),
    "huge_event": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "endless_line": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "endless_comment": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "endless_headers": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "endless_trailers": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "gzip_bomb": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "drip": (errors.UpstreamTimeout, errors.UpstreamTimeout),
    "comments_only": (errors.UpstreamTimeout, errors.UpstreamTimeout),
    "not_http": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "bad_chunk": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "truncated_chunk": (errors.UpstreamIncomplete, errors.UpstreamIncomplete),
    "length_and_chunked": (errors.UpstreamMalformed, errors.UpstreamMalformed),
    "switching_protocols": (errors.UpstreamMalformed, errors.UpstreamMalformed),
}

WIRE_ONLY = frozenset(
    {
        "endless_headers",
        "endless_trailers",
        "not_http",
        "bad_chunk",
        "length_and_chunked",
        "switching_protocols",
    }
)
"""Faults of HTTP/1.1 itself, which HTTP/2 cannot have."""
