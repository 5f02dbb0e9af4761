"""The cold routes, served by FastAPI: the registry of agents, the API explorer, the OpenAPI document."""

from api.admin.app import build_app

__all__ = ["build_app"]
