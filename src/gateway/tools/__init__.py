"""Tools: one manager over local callables, HTTP calls, OpenAPI documents and MCP servers."""
