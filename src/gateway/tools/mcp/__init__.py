"""MCP servers as tools: supervised sessions, guarded transports, pinned tool lists. Import `mcp` nowhere else."""
