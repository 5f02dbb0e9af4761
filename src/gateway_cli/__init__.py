"""The `gateway` command. Imports neither the Agents SDK nor the web framework until a command needs them."""
