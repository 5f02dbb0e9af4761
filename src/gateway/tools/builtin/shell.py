"""The built-in tool `shell`: a command line in a jail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.errors import InvalidToolArguments
from gateway.tools.builtin.jail import Outcome
from gateway.tools.builtin.jailed import JailedProvider
from gateway.tools.port import ProviderKind, ToolContext, ToolResult, ToolSpec

_LONGEST = 30_000  # characters; the kernel takes 128 KiB as one argument
_DESCRIPTION = (
    "Run a command line with /bin/sh in a sandbox: no network, the system's programs read-only, your files in "
    "/workspace (the current folder), which are kept between calls. The answer is JSON: exit_code, stdout, stderr, "
    "truncated, timed_out, and stopped, which says why if the command was ended early."
)
_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "required": ["command"],
    "properties": {
        "command": {
            "type": "string",
            "minLength": 1,
            "maxLength": _LONGEST,
            "description": "The command line, as for sh -c.",
        },
        "stdin": {"type": "string", "description": "Text for the command's standard input."},
    },
}


class ShellProvider(JailedProvider):
    """One shell."""

    kind: ProviderKind = "shell"
    description = _DESCRIPTION
    parameters = _PARAMETERS

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Run it; see `ToolProvider.call`."""
        command: str = arguments["command"]
        if "\0" in command:
            raise InvalidToolArguments("arguments.command: must not hold the character NUL.", param="arguments")
        outcome = await self._calls.run(
            ("/bin/sh", "-c", command),
            context,
            stdin=arguments.get("stdin", "").encode(),
            output_bytes=context.max_result_bytes * 3 // 8,
            adds=None,
        )
        if outcome is None:
            full = f"Not begun: {self._calls.workspaces.full()}"
            outcome = Outcome(exit_code=None, stdout=b"", stderr=b"", cut=False, timed_out=False, stopped=full)
        limit = context.max_result_bytes
        while True:  # most output is plain and fits; what has to be escaped at length is cut further
            value = {
                "exit_code": outcome.exit_code,
                "stdout": outcome.stdout.decode("utf-8", "replace"),
                "stderr": outcome.stderr.decode("utf-8", "replace"),
                "truncated": outcome.cut,
                "timed_out": outcome.timed_out,
                "stopped": outcome.stopped,
            }
            text = msgspec.json.encode(value)
            if len(text) <= limit:
                return ToolResult(text=text.decode(), structured=value, is_error=outcome.stopped is not None)
            outcome = msgspec.structs.replace(
                outcome,
                stdout=outcome.stdout[: len(outcome.stdout) // 2],
                stderr=outcome.stderr[: len(outcome.stderr) // 2],
                cut=True,
            )
