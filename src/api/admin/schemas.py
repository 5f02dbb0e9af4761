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


_MCP_REFUSAL = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
_NAMES = {"type": ["array", "null"], "items": _STRING}
_STATE = {"enum": ["healthy", "degraded", "unhealthy"]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _const(value: str) -> dict[str, Any]:
    return {"type": "string", "const": value}


def _event(data: dict[str, Any], *, ends: bool = True) -> dict[str, Any]:
    """Describe one event of a stream, whose data is JSON; the last one's is ``[DONE]`` if it ``ends`` so."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return _object({"data": {"anyOf": [_const("[DONE]"), text]} if ends else text})


def _answer(description: str, **content: dict[str, Any]) -> dict[str, Any]:
    types = {
        "json": "application/json",
        "text": "text/plain",
        "events": "text/event-stream",
        "html": "text/html",
        "openmetrics": "application/openmetrics-text",
    }
    return {
        "description": description,
        "content": {types[kind]: {"schema": schema} for kind, schema in content.items()},
    }


_TOOL_CALL = _object(
    {"id": _STRING, "type": _const("function"), "function": _object({"name": _STRING, "arguments": _STRING})}
)
_FINISH = {"type": ["string", "null"], "enum": ["stop", "length", "tool_calls", "content_filter", None]}

_PROVIDER = {"enum": ["local", "http", "openapi", "mcp", "shell", "file_ops", "research"]}
_SOURCE = {"enum": ["configuration", "store"], "description": "`tools.yaml`, or registered at run time."}

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
    "Tool": _object(
        {
            "name": _STRING,
            "provider": _PROVIDER,
            "entry": {"type": "string", "description": "The entry of tools.yaml."},
            "module": _nullable("string"),
            "url": _nullable("string"),
            "method": _nullable("string"),
            "title": _nullable("string"),
            "description": _STRING,
            "schema": {"type": "object", "description": "JSON Schema of the arguments."},
            "digest": {"type": "string", "description": "SHA-256 of what the tool says of itself."},
            "timeout": _NUMBER,
            "max_concurrency": _INTEGER,
            "max_result_bytes": _INTEGER,
            "idempotent": {"type": "boolean"},
            "read_only": {"type": "boolean"},
            "allowed_for": _nullable("object"),
            "status": {"enum": ["ready", "unavailable"]},
            "problem": _nullable("string"),
            "health": _object(
                {
                    "status": {"enum": ["unknown", "ok", "degraded", "down"]},
                    "detail": _nullable("string"),
                    "checked_at": _nullable("string"),
                }
            ),
        }
    ),
    "ToolList": _object(
        {
            "object": _const("list"),
            "data": _list(_ref("Tool")),
            "entries": _list(
                _object(
                    {
                        "entry": _STRING,
                        "provider": _nullable("string"),
                        "source": _SOURCE,
                        "health": {"type": "object"},
                    }
                )
            ),
        },
        "entries",
    ),
    "ToolEntry": _object(
        {
            "name": _STRING,
            "object": _const("tool_entry"),
            "provider": _PROVIDER,
            "source": _SOURCE,
            "url": _nullable("string"),
            "headers": {**_NAMES, "description": "Names of the headers that are sent, without their values."},
            "description": _nullable("string"),
            "tools": _NAMES,
            "problems": {"type": "object", "additionalProperties": _STRING},
            "health": _object({"status": _STRING, "detail": _nullable("string")}),
            "created_at": _nullable("string"),
            "created_by": _nullable("string"),
        }
    ),
    "ToolEntryList": _object({"object": _const("list"), "data": _list(_ref("ToolEntry"))}),
    "DeletedToolEntry": _object(
        {"name": _STRING, "object": _const("tool_entry.deleted"), "deleted": {"type": "boolean"}}
    ),
    "ToolAnswer": _object(
        {
            "tool_name": _STRING,
            "result": {"description": "The JSON value the tool gave, or its text; null beside an error."},
            "parts": _list({"type": "object"}),
            "error": {"type": ["string", "null"], "description": "What the tool itself reports as its failure."},
        }
    ),
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
    "ApiKey": _object(
        {
            "id": _STRING,
            "object": _const("api_key"),
            "source": {"enum": ["configuration", "store"]},
            "scopes": _list(_STRING),
            "allow_agents": _NAMES,
            "allow_tools": _NAMES,
            "namespace": _STRING,
            "profile": _STRING,
            "expires_at": _nullable("string"),
            "description": _nullable("string"),
            "limits": _nullable("object"),
            "end_user_limits": _nullable("object"),
            "created_at": _STRING,
            "created_by": _STRING,
            "revoked_at": _nullable("string"),
            "previous_key_until": _nullable("string"),
        },
        "description",
        "limits",
        "end_user_limits",
        "created_at",
        "created_by",
        "revoked_at",
        "previous_key_until",
    ),
    "ApiKeyList": _object({"object": _const("list"), "data": _list(_ref("ApiKey"))}),
    "NewApiKey": {
        "allOf": [_ref("ApiKey"), _object({"key": {"type": "string", "description": "The secret, this once."}})]
    },
    "UsageList": _object(
        {
            "object": _const("list"),
            "from": _STRING,
            "to": _STRING,
            "group_by": _list(_STRING),
            "data": _list({"type": "object"}),
            "has_more": {"type": "boolean"},
            "next_offset": _nullable("integer"),
        }
    ),
    "EndpointTimes": _object(
        {
            "summary": _object({"status": _STATE, "endpoints": _INTEGER, "requests": _INTEGER, "errors": _INTEGER}),
            "endpoints": _list(
                _object({"endpoint": _STRING, "status": _STATE, "count": _INTEGER, "status_codes": {"type": "object"}})
            ),
        }
    ),
    "McpReview": _object(
        {
            "server": _STRING,
            "status": _STRING,
            "detail": _nullable("string"),
            "waiting": _list(
                _object(
                    {
                        "tool": _STRING,
                        "reason": _STRING,
                        "accepted": _nullable("string"),
                        "listed": _nullable("string"),
                        "digest": {"type": "string", "description": "SHA-256 of what is listed."},
                    }
                )
            ),
        }
    ),
    "McpApproval": _object({"server": _STRING, "approved": _list(_STRING)}),
    "Health": _object({"status": _STRING, "service": _STRING}),
    "Readiness": _object(
        {
            "status": {"enum": ["starting", "ready", "waiting", "stopping"]},
            "service": _STRING,
            "components": {"type": "object", "additionalProperties": _STRING},
            "needs": {"type": "object", "additionalProperties": _ref("ProviderStatus")},
        }
    ),
    "ProviderStatus": {"enum": ["ok", "reachable", "down", "timeout", "unknown"]},
    "Providers": {
        "type": "object",
        "description": "By kind.",
        "additionalProperties": _object(
            {"default": {"type": ["string", "null"]}, "available": {"type": "array", "items": _STRING}}
        ),
    },
    "ProvidersStatus": _object(
        {
            "status": {"enum": ["ok", "degraded"]},
            "checks": {"type": "object", "additionalProperties": _ref("ProviderStatus")},
        }
    ),
    "AuthConfig": _object(
        {
            "type": {"enum": ["api_key", "jwt"]},
            "headers": {"type": "array", "items": _STRING},
            "issuers": {"type": "array", "items": _STRING},
        }
    ),
    "Caller": _object(
        {
            "id": _STRING,
            "type": {"enum": ["api_key", "jwt"]},
            "is_admin": {"type": "boolean"},
            "groups": {"type": "array", "items": _STRING},
            "scopes": {"type": "array", "items": _STRING},
            "key_id": _STRING,
            "issuer": {"type": ["string", "null"]},
        }
    ),
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
            events=_event(_ref("ChatCompletionChunk")),
        )
    },
    "completions.create": {
        "200": _answer(
            "OpenAI's completion; with `stream: true`, events of it.",
            json={"type": "object"},
            events=_event({"type": "object"}),
        )
    },
    "embeddings.create": {"200": _answer("OpenAI's list of embeddings.", json={"type": "object"})},
    "models.list": {"200": _answer("The models the key reaches.", json=_ref("ModelList"))},
    "models.get": {"200": _answer("The model.", json=_ref("Model"))},
    "tools.list": {"200": _answer("The tools the key reaches; an admin sees all.", json=_ref("ToolList"))},
    "tools.refresh": {"200": _answer("All tools.", json=_ref("ToolList"))},
    "tools.register": {"201": _answer("The entry.", json=_ref("ToolEntry"))},
    "tools.search": {"200": _answer("The tools found, the best first.", json=_ref("ToolList"))},
    "tools.get": {"200": _answer("The tool.", json=_ref("Tool"))},
    "tools.delete": {"200": _answer("It is gone.", json=_ref("DeletedToolEntry"))},
    "tools.servers.list": {"200": _answer("The MCP servers.", json=_ref("ToolEntryList"))},
    "tools.servers.register": {"201": _answer("The entry.", json=_ref("ToolEntry"))},
    "tools.servers.get": {"200": _answer("The MCP server.", json=_ref("ToolEntry"))},
    "tools.servers.delete": {"200": _answer("It is gone.", json=_ref("DeletedToolEntry"))},
    "tools.invoke": {"200": _answer("What the tool gave.", json=_ref("ToolAnswer"))},
    "service.overview": {"200": _answer("The service.", json=_ref("Overview"))},
    "service.health": {"200": _answer("The process serves.", json=_ref("Health"))},
    "service.ready": {
        "200": _answer("Every agent is loaded.", json=_ref("Readiness")),
        "503": _answer("Agents are still loading, or what it needs is down.", json=_ref("Readiness")),
    },
    "auth.config": {"200": _answer("How to show who one is.", json=_ref("AuthConfig"))},
    "auth.whoami": {"200": _answer("The caller.", json=_ref("Caller"))},
    "providers.list": {"200": _answer("Names by kind.", json=_ref("Providers"))},
    "providers.status": {"200": _answer("How each is.", json=_ref("ProvidersStatus"))},
    "service.docs": {"200": _answer("A page.", html=_STRING)},
    "service.openapi": {"200": _answer("This document.", json={"type": "object"})},
    "metrics.read": {"200": _answer("The totals.", json=_ref("MetricsSnapshot"), text=_STRING, openmetrics=_STRING)},
    "metrics.scrape": {"200": _answer("The exposition.", text=_STRING, openmetrics=_STRING)},
    "service.endpoints": {"200": _answer("Each route's times.", json=_ref("EndpointTimes"))},
    "security.keys.list": {"200": _answer("Every key.", json=_ref("ApiKeyList"))},
    "security.keys.create": {"201": _answer("The key and its secret.", json=_ref("NewApiKey"))},
    "security.keys.rotate": {"200": _answer("The key and its new secret.", json=_ref("NewApiKey"))},
    "security.keys.revoke": {"200": _answer("The key, revoked.", json=_ref("ApiKey"))},
    "usage.read": {"200": _answer("Sums, one per group.", json=_ref("UsageList"))},
    "tools.mcp.review": {"200": _answer("What waits.", json=_ref("McpReview"))},
    "tools.mcp.approve": {"200": _answer("What was accepted.", json=_ref("McpApproval"))},
    "mcp.message": {
        "200": _answer(
            "A message of JSON-RPC.", json={"type": "object"}, events=_event({"type": "object"}, ends=False)
        ),
        "202": {"description": "A notification was taken."},
        "400": _answer("No message, as JSON-RPC says it; or nothing that is read as one.", json=_MCP_REFUSAL),
    },
    "mcp.stream": {"405": {"description": "Always."}},
    "mcp.end": {"405": {"description": "Always."}},
}
"""Answers by action; those of FastAPI's own routes come from their models."""
