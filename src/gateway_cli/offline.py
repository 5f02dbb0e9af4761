"""Looking at a folder of agents without a running gateway, in a process of its own.

`inspect_folder` starts ``python -m gateway_cli.offline``, which opens the gateway as a server would, without a socket,
and writes what it loaded into a file. Importing strangers' code cannot take the command down with it, whatever it
prints or calls.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.registry.entry import Diagnostic, ModelConfig, Status
from gateway_cli.errors import CliError

_LIMIT_S = 300.0
_ENDED = "The process that imports the agents ended without an answer; one of them ends Python when it is imported."


@dataclass(frozen=True, slots=True)
class Inspected:
    """One agent of the folder, as the gateway would list it."""

    name: str
    status: Status
    file: str | None
    model: str | None
    upstream: str | None
    tools: tuple[str, ...]
    description: str | None
    diagnostics: tuple[Diagnostic, ...]
    model_config: ModelConfig | None = None


@dataclass(frozen=True, slots=True)
class _Order:
    settings: dict[str, Any]
    target: Path


@dataclass(frozen=True, slots=True)
class _Answer:
    agents: tuple[Inspected, ...] = ()
    refusal: str | None = None


def inspect_folder(settings: Settings) -> tuple[Inspected, ...]:
    """Import every agent and return what the gateway would list; raise `CliError` when it would not even start."""
    quiet = replace(
        settings, agent_auto_reload=False, upstream_auto_reload=False, tool_auto_reload=False, log_level="error"
    )
    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        target = Path(folder) / "answer.json"
        order = _Order({name: getattr(quiet, name) for name in Settings.__dataclass_fields__}, target)
        try:
            subprocess.run(
                [sys.executable, "-P", "-m", "gateway_cli.offline"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                input=msgspec.json.encode(order, enc_hook=str),
                stdout=subprocess.DEVNULL,
                timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CliError(f"The agents were not imported within {_LIMIT_S:g} s.") from error
        try:
            answer = msgspec.json.decode(target.read_bytes(), type=_Answer)
        except (OSError, msgspec.DecodeError) as error:
            raise CliError(_ENDED) from error
    if answer.refusal is not None:
        raise CliError(answer.refusal)
    return answer.agents


def main() -> None:
    """Carry out one order from stdin: the child's side."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order, dec_hook=_to_path)
    settings = msgspec.convert(order.settings, type=Settings, dec_hook=_to_path)
    try:
        answer = asyncio.run(_inspect(settings))
    except GatewayError as error:
        answer = _Answer(refusal=error.message)
    except KeyboardInterrupt:
        return  # Ctrl-C reaches this process, too; the command ends by it
    with suppress(BrokenPipeError):
        order.target.write_bytes(msgspec.json.encode(answer))


async def _inspect(settings: Settings) -> _Answer:
    # Deferred on purpose: only this process pays for what serving needs.
    from api.bootstrap import open_gateway  # noqa: PLC0415

    async with open_gateway(settings) as gateway:
        await gateway.loaded.wait()
        return _Answer(
            tuple(
                Inspected(
                    name=entry.id,
                    status=entry.status,
                    file=entry.file,
                    model=entry.model,
                    upstream=entry.upstream,
                    tools=entry.tools,
                    description=entry.description,
                    diagnostics=entry.diagnostics,
                    model_config=entry.model_config,
                )
                for entry in gateway.holder.current.registry.list_entries()
            )
        )


def _to_path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else value


if __name__ == "__main__":
    main()
