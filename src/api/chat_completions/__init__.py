"""The Chat Completions surface."""
