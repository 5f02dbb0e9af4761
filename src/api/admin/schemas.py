"""What the plain routes answer, as JSON Schema for the OpenAPI document.

The chat shapes are those of OpenAI's own document, cut to what this gateway sends.
"""

from __future__ import annotations

from typing import Any

_STRING = {"type": "string"}
_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}


def _nullable(type_: str) -> dict[str, Any]:
    return {"type": [type_, "null"]}


def _object(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _const(value: str) -> dict[str, Any]:
    return {"type": "string", "const": value}


def _answer(description: str, **content: dict[str, Any]) -> dict[str, Any]:
    types = {"json": "application/json", "text": "text/plain", "events": "text/event-stream", "html": "text/html"}
    return {
        "description": description,
        "content": {types[kind]: {"schema": schema} for kind, schema in content.items()},
    }


_TOOL_CALL = _object(
    {"id": _STRING, "type": _const("function"), "function": _object({"name": _STRING, "arguments": _STRING})}
)
_FINISH = {"type": ["string", "null"], "enum": ["stop", "length", "tool_calls", "content_filter", None]}

COMPONENTS: dict[str, Any] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": {"type": "string", "description": "What went wrong and what to do."},
                    "type": _STRING,
                    "param": _nullable("string"),
                    "code": _nullable("string"),
                }
            )
        }
    ),
    "Model": _object(
        {
            "id": {"type": "string", "description": "`namespace/slug`, or `upstream/model`."},
            "object": _const("model"),
            "created": _INTEGER,
            "owned_by": _STRING,
            "name": _STRING,
            "description": _nullable("string"),
            "metadata": {
                **_object({"namespace": _STRING, "display_name": _STRING, "kind": _STRING}),
                "additionalProperties": True,
            },
        }
    ),
    "ModelList": _object({"object": _const("list"), "data": _list(_ref("Model"))}),
    "Usage": _object(
        {
            "prompt_tokens": _INTEGER,
            "completion_tokens": _INTEGER,
            "total_tokens": _INTEGER,
            "prompt_tokens_details": {"type": "object"},
            "completion_tokens_details": {"type": "object"},
        },
        "prompt_tokens_details",
        "completion_tokens_details",
    ),
    "ChatCompletion": _object(
        {
            "id": _STRING,
            "object": _const("chat.completion"),
            "created": _INTEGER,
            "model": _STRING,
            "choices": _list(
                _object(
                    {
                        "index": _INTEGER,
                        "message": _object(
                            {
                                "role": _const("assistant"),
                                "content": _nullable("string"),
                                "refusal": _nullable("string"),
                                "tool_calls": _list(_TOOL_CALL),
                            },
                            "refusal",
                            "tool_calls",
                        ),
                        "finish_reason": _FINISH,
                        "logprobs": _nullable("object"),
                    },
                    "logprobs",
                )
            ),
            "usage": _ref("Usage"),
        },
        "usage",
    ),
    "ChatCompletionChunk": _object(
        {
            "id": _STRING,
            "object": _const("chat.completion.chunk"),
            "created": _INTEGER,
            "model": _STRING,
            "choices": _list(
                _object({"index": _INTEGER, "delta": {"type": "object"}, "finish_reason": _FINISH}, "finish_reason")
            ),
            "usage": {"anyOf": [_ref("Usage"), {"type": "null"}]},
        },
        "usage",
    ),
    "Health": _object({"status": _STRING, "service": _STRING}),
    "Readiness": _object({"status": _STRING, "service": _STRING, "components": {"type": "object"}}),
    "Overview": _object({"status": _STRING, "service": _STRING, "version": _STRING, "links": {"type": "object"}}),
    "MetricsSnapshot": _object(
        {
            "total_requests": _INTEGER,
            "streaming_requests": _INTEGER,
            "average_latency_ms": _NUMBER,
            "max_latency_ms": _NUMBER,
            "min_latency_ms": _NUMBER,
            "tool_invocations": _INTEGER,
            "tool_failures": _INTEGER,
            "average_tool_latency_ms": _NUMBER,
            "tool_breakdown": {
                "type": "object",
                "description": "By tool, then by who asked for it.",
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": _object(
                        {"provider": _STRING, "count": _INTEGER, "failures": _INTEGER, "latency_ms": _NUMBER}
                    ),
                },
            },
            "dropin_failures": {"type": "object", "additionalProperties": _INTEGER},
        }
    ),
}

ANSWERS: dict[str, dict[str, Any]] = {
    "chat.completions.create": {
        "200": _answer(
            "The answer; with `stream: true`, events whose data is a ChatCompletionChunk, then `[DONE]`.",
            json=_ref("ChatCompletion"),
            events=_ref("ChatCompletionChunk"),
        )
    },
    "completions.create": {
        "200": _answer(
            "OpenAI's completion; with `stream: true`, events of it.", json={"type": "object"}, events=_STRING
        )
    },
    "embeddings.create": {"200": _answer("OpenAI's list of embeddings.", json={"type": "object"})},
    "models.list": {"200": _answer("The models the key reaches.", json=_ref("ModelList"))},
    "models.get": {"200": _answer("The model.", json=_ref("Model"))},
    "service.overview": {"200": _answer("The service.", json=_ref("Overview"))},
    "service.health": {"200": _answer("The process serves.", json=_ref("Health"))},
    "service.ready": {
        "200": _answer("Every agent is loaded.", json=_ref("Readiness")),
        "503": _answer("Agents are still loading.", json=_ref("Readiness")),
    },
    "service.docs": {"200": _answer("A page.", html=_STRING)},
    "service.openapi": {"200": _answer("This document.", json={"type": "object"})},
    "metrics.read": {"200": _answer("The totals.", json=_ref("MetricsSnapshot"), text=_STRING)},
    "metrics.scrape": {"200": _answer("The exposition.", text=_STRING)},
}
"""Answers by action; those of FastAPI's own routes come from their models."""
