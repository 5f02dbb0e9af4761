"""Tools that the gateway brings along: a shell and file operations inside a jail, and research on the web."""
