"""Upstreams: the servers that have models, how they are configured, found and called."""
