"""The room that speaks the OpenAI Agents SDK; the only one that imports `agents`."""
