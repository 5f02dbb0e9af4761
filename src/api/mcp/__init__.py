"""The MCP server face: the caller's tools and agents for any MCP client. Only `server` imports `mcp`."""
