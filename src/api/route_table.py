"""The route table: every path the product answers, with its action and the scope it needs.

The dispatcher, the FastAPI application, the OpenAPI document and the tests all read this list.
"""

from __future__ import annotations

from api.chat_completions.routes import create_chat_completion
from api.health import health, overview, ready
from api.metrics import metrics, prometheus
from api.models import get_model, list_models
from api.routing import Route, RouteTable

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
        Route("GET", "/readyz", "service.ready", "public", "Readiness: 503 until the agents are loaded.", ready),
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
            "The last 200 diagnostics, newest first.",
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
        Route("GET", "/docs", "service.docs", "public", "The API explorer."),
        Route("GET", "/openapi.json", "service.openapi", "public", "The OpenAPI document."),
    ]
)
