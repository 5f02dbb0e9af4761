"""The built-in tool `file_ops`: files of a workspace, read and changed from inside a jail."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gateway.config import Settings
from gateway.errors import InvalidToolArguments, ToolFailed
from gateway.tools.builtin.jailed import JailedProvider
from gateway.tools.config import FileOpsTool
from gateway.tools.port import ProviderKind, ToolContext, ToolResult, ToolSpec

_INSIDE = Path(__file__).with_name("files_inside.py")
_NEEDS = {
    "read": ("path",),
    "write": ("path", "content"),
    "append": ("path", "content"),
    "delete": ("path",),
    "move": ("path", "to"),
    "mkdir": ("path",),
    "stat": ("path",),
    "list": (),
    "search": (),
}
_DESCRIPTION = (
    "Work with the files of your workspace, which are kept between calls. Paths are relative to /workspace. "
    "read: a text file (UTF-8), from byte offset on, at most limit bytes. write: content as the whole file; append: to "
    "its end; folders above are made. list: what a folder holds. stat: what is at a path. mkdir, delete (recursive for "
    "folders that hold something), move (to, overwrite). search: lines that hold text, in files whose name matches "
    "glob; without text, the files. The answer is JSON, or {error: {code, message}}."
)
_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "required": ["operation"],
    "properties": {
        "operation": {"type": "string", "enum": list(_NEEDS)},
        "path": {"type": "string", "minLength": 1, "maxLength": 4_096},
        "content": {"type": "string", "description": "write, append: the text."},
        "to": {"type": "string", "minLength": 1, "maxLength": 4_096, "description": "move: the new path."},
        "overwrite": {"type": "boolean", "description": "move: replace what is there."},
        "recursive": {"type": "boolean", "description": "delete: with everything in the folder."},
        "offset": {"type": "integer", "minimum": 0, "maximum": 2**53, "description": "read: the first byte."},
        "limit": {"type": "integer", "minimum": 1, "maximum": 2**53, "description": "read: bytes at most."},
        "text": {"type": "string", "maxLength": 1_000, "description": "search: what a line must hold."},
        "glob": {"type": "string", "maxLength": 1_000, "description": "search: a pattern of names, as *.py."},
    },
}


class FileOpsProvider(JailedProvider):
    """File operations; each call is a jail of its own, in which a small program does the work."""

    kind: ProviderKind = "file_ops"
    description = _DESCRIPTION
    parameters = _PARAMETERS

    def __init__(self, config: FileOpsTool, settings: Settings) -> None:
        """See `JailedProvider`."""
        super().__init__(config, settings, shown=_folders_of_python())
        self._program = _INSIDE.read_text(encoding="utf-8")

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Do it; see `ToolProvider.call`."""
        operation = arguments["operation"]
        missing = [name for name in _NEEDS[operation] if name not in arguments]
        if missing:
            raise InvalidToolArguments(
                f"arguments.{missing[0]}: '{operation}' needs it; add it to the arguments.", param="arguments"
            )
        room = context.max_result_bytes
        request = {**arguments, "most": max(256, room - 512 - 2 * len(arguments.get("path", "")))}
        content = arguments["content"] if operation in ("write", "append") else ""
        outcome = await self._calls.run(
            (*_python(), self._program),
            context,
            stdin=msgspec.json.encode(request),
            output_bytes=room + 1,
            adds=len(content.encode()),
        )
        if outcome is None:
            return _refusal("workspace_full", self._calls.workspaces.full())
        if outcome.stopped is not None:
            return _refusal("stopped", outcome.stopped)
        if outcome.exit_code != 0:
            raise ToolFailed(f"The tool '{self.entry}' ended before it had answered (exit code {outcome.exit_code}).")
        if len(outcome.stdout) > room:
            return _refusal("too_large", f"The answer is larger than {room:,} bytes; ask for a part of it.")
        value = msgspec.json.decode(outcome.stdout)
        return ToolResult(text=outcome.stdout.decode(), structured=value, is_error="error" in value)


def _refusal(code: str, message: str) -> ToolResult:
    value = {"error": {"code": code, "message": message}}
    return ToolResult(text=msgspec.json.encode(value).decode(), structured=value, is_error=True)


def _python() -> tuple[str, ...]:
    """Return the interpreter that runs the gateway, without what its environment adds."""
    return (str(Path(getattr(sys, "_base_executable", sys.executable)).resolve()), "-I", "-S", "-B", "-X", "utf8", "-c")


def _folders_of_python() -> tuple[Path, ...]:
    """Return where that interpreter and its library are, unless among the system's programs, which are shown anyway."""
    library, program = Path(sys.base_prefix).resolve(), Path(_python()[0]).parent
    places = (library,) if program.is_relative_to(library) else (library, program)
    return tuple(place for place in places if not place.is_relative_to("/usr"))
