"""The route table: every path the product answers, with its action and the scope it needs.

The dispatcher, the FastAPI application, the OpenAPI document and the tests all read this list.
"""

from __future__ import annotations

from api.chat_completions.routes import create_chat_completion
from api.health import health, overview, ready
from api.metrics import metrics, prometheus
from api.models import get_model, list_models
from api.relayed.routes import NamesModel, create_completion, create_embedding, relayed
from api.routing import Route, RouteTable

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
        Route("GET", "/docs", "service.docs", "public", "The API explorer."),
        Route("GET", "/openapi.json", "service.openapi", "public", "The OpenAPI document."),
    ]
)
