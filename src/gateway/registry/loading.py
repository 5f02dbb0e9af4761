"""What is loaded and what comes of it: the values between discovery, a loader and the catalogue."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gateway.registry.entry import AgentEntry, AgentOptions, Diagnostic, ModelConfig


@dataclass(frozen=True, slots=True)
class DropIn:
    """One file that should hold an agent, before any of its code has run.

    ``root`` is the discovery root and ``folder`` the folder whose other files are the drop-in's private modules
    (the root itself for a single file). ``label`` is the file's path relative to the root, with ``/``: the only
    spelling of it that is shown. ``module`` is set for ``kind: sdk`` agents of `agents.yaml`, whose code is imported
    by that name; ``attribute`` then names the export. ``default_upstream`` and ``default_model`` come from the defaults
    of `agents.yaml`, for agents that name none; ``model_config`` are its entries, by model id, that may be meant for an
    agent of this file.
    """

    namespace: str
    slug: str
    root: Path
    folder: Path
    file: Path
    label: str
    module: str | None = None
    attribute: str | None = None
    default_upstream: str | None = None
    default_model: str | None = None
    model_config: tuple[tuple[str, ModelConfig], ...] = ()

    @property
    def id(self) -> str:
        """``namespace/slug``: the model id, unless ``__gateway__`` names another namespace."""
        return f"{self.namespace}/{self.slug}"

    def may_publish(self, model_id: str) -> bool:
        """Whether an agent of this file may come to have that id: its namespace is known when it has been read."""
        name = model_id.partition("/")[2]
        return name == self.slug or name.startswith(f"{self.slug}-")

    @property
    def is_single_file(self) -> bool:
        """Whether the drop-in is a file directly in the root instead of a folder."""
        return self.module is None and self.folder == self.root


@dataclass(frozen=True, slots=True)
class Declaration:
    """One agent of `agents.yaml`, defaults applied. ``dropin`` is set for ``kind: sdk``, and None for declarative.

    ``tools`` are names of the gateway's tools; ``model_config`` is the entry for it.
    """

    namespace: str
    slug: str
    name: str
    line: int
    label: str
    created: int
    options: AgentOptions
    instructions: str | None = None
    tool_choice: str | None = None
    tools: tuple[str, ...] = ()
    owned_by: str | None = None
    model_config: ModelConfig | None = None
    dropin: DropIn | None = None

    @property
    def id(self) -> str:
        """``namespace/slug``."""
        return f"{self.namespace}/{self.slug}"


@dataclass(frozen=True, slots=True)
class LoadedGeneration:
    """One load of a drop-in, ready to serve.

    ``describe`` returns its registry rows, checked against the upstreams of the moment (after a reload of
    `upstreams.yaml` the answer may differ). ``files`` maps every file that the code came from, or that it read while
    it was imported, to the SHA-256 of what was read. ``release`` waits for the last run, then lets go of the modules.
    """

    number: int
    describe: Callable[[], Sequence[AgentEntry]]
    release: Callable[[], Awaitable[None]]
    files: Mapping[Path, str] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()


class LoadFailed(Exception):
    """A drop-in cannot be served; ``files`` is what was read until then (a change of one is a reason to retry)."""

    def __init__(self, *diagnostics: Diagnostic, files: Mapping[Path, str] | None = None) -> None:
        super().__init__("; ".join(item.message for item in diagnostics))
        self.diagnostics = diagnostics
        self.files: Mapping[Path, str] = files or {}


class AgentLoader(Protocol):
    """Turns what discovery found into something that runs."""

    async def load(self, dropin: DropIn, generation: int) -> LoadedGeneration:
        """Load a drop-in as ``generation``; raise `LoadFailed`. Cancelling gives the load up."""
        ...

    async def load_declared(self, declaration: Declaration, generation: int) -> LoadedGeneration:
        """Load an agent of `agents.yaml`; raise `LoadFailed`."""
        ...
