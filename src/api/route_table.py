"""The route table: every path the product answers, with its action and the scope it needs.

The dispatcher, the FastAPI application, the OpenAPI document and the tests all read this list.
"""

from __future__ import annotations

from api.auth import auth_config, whoami
from api.chat_completions.routes import create_chat_completion
from api.health import endpoints, health, overview, ready
from api.keys import create_key, list_keys, revoke_key, rotate_key
from api.mcp.approval import approve_tools, review_tools
from api.mcp.metadata import WELL_KNOWN, protected_resource
from api.mcp.routes import refuse_stream, serve_mcp
from api.metrics import metrics, prometheus
from api.models import get_model, list_models
from api.providers import list_providers, providers_status
from api.relayed.routes import NamesModel, create_completion, create_embedding, relayed
from api.routing import Route, RouteTable
from api.tools import invoke_tool, list_tools, refresh_tools
from api.usage import read_usage

RELAYED: tuple[tuple[str, str, str, NamesModel, str], ...] = (
    ("POST", "/audio/speech", "audio.speech", "always", "Speak a text with a raw upstream model."),
    ("POST", "/audio/transcriptions", "audio.transcriptions", "always", "Write down speech with a raw upstream model."),
    ("POST", "/audio/translations", "audio.translations", "always", "Translate speech with a raw upstream model."),
    ("POST", "/images/generations", "images.generate", "perhaps", "Paint a picture at an upstream."),
    ("POST", "/images/edits", "images.edit", "perhaps", "Change a picture at an upstream."),
    ("POST", "/images/variations", "images.vary", "perhaps", "Vary a picture at an upstream."),
    ("POST", "/moderations", "moderations.create", "perhaps", "Judge texts and pictures at an upstream."),
    ("GET", "/files", "files.list", "never", "List the files kept at an upstream."),
    ("POST", "/files", "files.create", "never", "Upload a file to an upstream."),
    ("GET", "/files/{file_id}", "files.get", "never", "Describe a file at an upstream."),
    ("DELETE", "/files/{file_id}", "files.delete", "never", "Delete a file at an upstream."),
    ("GET", "/files/{file_id}/content", "files.content", "never", "Download a file from an upstream."),
    ("GET", "/batches", "batches.list", "never", "List the batches of an upstream."),
    ("POST", "/batches", "batches.create", "never", "Start a batch at an upstream."),
    ("GET", "/batches/{batch_id}", "batches.get", "never", "Describe a batch at an upstream."),
    ("POST", "/batches/{batch_id}/cancel", "batches.cancel", "never", "Cancel a batch at an upstream."),
)
"""What is relayed as bytes: method, path below ``/v1``, action, whether requests name a model, effect."""

TABLE = RouteTable(
    [
        Route(
            "POST",
            "/v1/chat/completions",
            "chat.completions.create",
            "chat",
            "Answer a conversation with an agent or a raw upstream model, streamed or not.",
            create_chat_completion,
            aliases=("/chat/completions",),
        ),
        Route(
            "POST",
            "/v1/completions",
            "completions.create",
            "chat",
            "Complete a text with a raw upstream model, streamed or not.",
            create_completion,
            aliases=("/completions",),
        ),
        Route(
            "POST",
            "/v1/embeddings",
            "embeddings.create",
            "chat",
            "Embed texts with a raw upstream model.",
            create_embedding,
            aliases=("/embeddings",),
        ),
        *(
            Route(method, f"/v1{path}", action, "chat", summary, relayed(path, model=model))
            for method, path, action, model, summary in RELAYED
        ),
        Route(
            "GET", "/v1/models", "models.list", "chat", "List the models the key reaches.", list_models, ("/models",)
        ),
        Route(
            "GET",
            "/v1/models/{model:path}",
            "models.get",
            "chat",
            "Describe one model; its id may contain slashes.",
            get_model,
            ("/models/{model:path}",),
        ),
        Route("GET", "/", "service.overview", "public", "Name, version and links.", overview),
        Route("GET", "/health", "service.health", "public", "Liveness.", health, ("/healthz",)),
        Route("GET", "/readyz", "service.ready", "public", "Readiness: 503 until it should get traffic.", ready),
        Route("GET", "/auth/config", "auth.config", "public", "How callers show who they are.", auth_config),
        Route("GET", "/api/v1/auth/whoami", "auth.whoami", "chat", "Who the caller is, and its scopes.", whoami),
        Route(
            "GET",
            "/api/v1/providers",
            "providers.list",
            "admin",
            "What the gateway leans on, by kind: upstreams, tools, store, Redis.",
            list_providers,
        ),
        Route(
            "GET",
            "/api/v1/providers/status",
            "providers.status",
            "admin",
            "Ask all of it now whether it is well.",
            providers_status,
        ),
        Route(
            "GET",
            "/api/health/endpoints",
            "service.endpoints",
            "metrics",
            "How often and how fast each route has answered, over all workers.",
            endpoints,
        ),
        Route("GET", "/metrics", "metrics.read", "metrics", "Metrics as JSON or text.", metrics, ("/admin/metrics",)),
        Route("GET", "/metrics/prometheus", "metrics.scrape", "metrics", "Metrics for Prometheus.", prometheus),
        Route(
            "GET",
            "/agents",
            "agents.list",
            "admin",
            "Every agent with its status and diagnostics.",
            aliases=("/admin/agents",),
        ),
        Route(
            "POST",
            "/agents/refresh",
            "agents.refresh",
            "admin",
            "Look at the drop-in folders again and load what changed.",
            aliases=("/admin/agents/refresh",),
        ),
        Route(
            "GET",
            "/agents/errors",
            "agents.errors",
            "admin",
            "The last 200 diagnostics and failed runs, newest first.",
            aliases=("/admin/agents/errors",),
        ),
        Route(
            "GET",
            "/upstreams",
            "upstreams.list",
            "admin",
            "Every upstream with its health.",
            aliases=("/admin/upstreams",),
        ),
        Route(
            "POST",
            "/upstreams/refresh",
            "upstreams.refresh",
            "admin",
            "Read upstreams.yaml again, probe every upstream and list their models.",
            aliases=("/admin/upstreams/refresh",),
        ),
        Route(
            "POST",
            "/security/refresh",
            "security.refresh",
            "admin",
            "Read security.yaml again and list the keys, never their material.",
            aliases=("/admin/security/refresh",),
        ),
        Route(
            "POST",
            "/security/preview",
            "security.preview",
            "admin",
            "Say whether a key reaches a model, and why.",
            aliases=("/admin/security/preview",),
        ),
        Route(
            "POST",
            "/security/override",
            "security.overrides.create",
            "admin",
            "Grant what matches a pattern to every key, or one, for at most a day.",
            aliases=("/admin/security/override",),
        ),
        Route("GET", "/security/overrides", "security.overrides.list", "admin", "The overrides in force."),
        Route(
            "DELETE",
            "/security/overrides/{override_id}",
            "security.overrides.delete",
            "admin",
            "End an override before its time.",
        ),
        Route(
            "GET",
            "/security/keys",
            "security.keys.list",
            "admin",
            "Every key with what it may, never its secret or digest.",
            list_keys,
            aliases=("/admin/security/keys",),
        ),
        Route(
            "POST",
            "/security/keys",
            "security.keys.create",
            "admin",
            "Make a key; the answer holds its secret, this once.",
            create_key,
            aliases=("/admin/security/keys",),
        ),
        Route(
            "POST",
            "/security/keys/{key_id}/rotate",
            "security.keys.rotate",
            "admin",
            "Give a key a new secret; the old one works for a while.",
            rotate_key,
            aliases=("/admin/security/keys/{key_id}/rotate",),
        ),
        Route(
            "DELETE",
            "/security/keys/{key_id}",
            "security.keys.revoke",
            "admin",
            "Revoke a key, in every process within a second; its open streams end.",
            revoke_key,
            aliases=("/admin/security/keys/{key_id}",),
        ),
        Route(
            "GET",
            "/usage",
            "usage.read",
            "chat",
            "What was used and what it cost, of the caller's key, or of all with the scope `admin`.",
            read_usage,
            aliases=("/admin/usage",),
        ),
        Route(
            "GET",
            "/tools",
            "tools.list",
            "chat",
            "The gateway's tools that the key reaches, with schema and health.",
            list_tools,
            aliases=("/admin/tools",),
        ),
        Route(
            "POST",
            "/tools/refresh",
            "tools.refresh",
            "admin",
            "Read tools.yaml again and ask every server for its tools.",
            refresh_tools,
            aliases=("/admin/tools/refresh",),
        ),
        Route(
            "POST",
            "/tools/{name}/invoke",
            "tools.invoke",
            "chat",
            "Call a tool that the key reaches.",
            invoke_tool,
        ),
        Route(
            "GET",
            "/tools/mcp/{server}",
            "tools.mcp.review",
            "admin",
            "The tools of an MCP server that wait for approval, as accepted and as listed now.",
            review_tools,
        ),
        Route(
            "POST",
            "/tools/mcp/{server}/approve",
            "tools.mcp.approve",
            "admin",
            "Accept tools of an MCP server that are new or changed.",
            approve_tools,
        ),
        Route(
            "POST",
            "/mcp",
            "mcp.message",
            "chat",
            "One message of an MCP client: list or call the caller's tools and agents.",
            serve_mcp,
            aliases=("/mcp/",),
        ),
        Route(
            "GET",
            "/mcp",
            "mcp.stream",
            "chat",
            "Always 405: this MCP server keeps no sessions.",
            refuse_stream,
            aliases=("/mcp/",),
        ),
        Route(
            "DELETE",
            "/mcp",
            "mcp.end",
            "chat",
            "Always 405: this MCP server keeps no sessions.",
            refuse_stream,
            aliases=("/mcp/",),
        ),
        Route(
            "GET",
            WELL_KNOWN,
            "mcp.resource",
            "public",
            "Where clients get tokens for this gateway (RFC 9728); 404 where it accepts keys alone.",
            protected_resource,
            aliases=(f"{WELL_KNOWN}/mcp",),
        ),
        Route("GET", "/docs", "service.docs", "public", "The API explorer."),
        Route("GET", "/openapi.json", "service.openapi", "public", "The OpenAPI document."),
    ]
)
