"""`tools.yaml` as typed values: a tagged union of tool entries, checked by name when it is read.

```yaml
version: 1
tools:
  - name: get_weather
    provider: local
    module: weather.api:get_weather
  - name: search_orders
    provider: http
    url: https://orders.example.com/search
    headers: {authorization: env:ORDERS_TOKEN}
    schema: {type: object, required: [q], properties: {q: {type: string}}}
  - name: github
    provider: mcp
    url: https://mcp.example.com/mcp
  - name: billing
    provider: openapi
    document: config/billing.yaml
  - name: sandbox
    provider: shell
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError

FILE = "tools.yaml"

Seconds = Annotated[float, Meta(gt=0, le=3_600)]
Bytes = Annotated[int, Meta(ge=1_024, le=64 * 1024 * 1024)]
ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Secret = str
"""A text, or where to find it: ``env:NAME`` or ``file:/path`` (`gateway.tools.secrets`). Never logged."""


class AllowedFor(Struct, frozen=True, kw_only=True):
    """Who may call a tool, over and above what a key allows: fnmatch patterns.

    ``agents`` are matched with the canonical id of the agent that was called, ``keys`` with the id of the key.
    ``direct`` is whether clients may call it without an agent (`POST /tools/{name}/invoke`, `/mcp`).
    """

    agents: tuple[str, ...] = ("*",)
    keys: tuple[str, ...] = ("*",)
    direct: bool = True


class ArgumentRule(Struct, frozen=True, kw_only=True):
    """A bound on one argument (``path``, ``filter.owner``), judged at every call whatever the model says.

    All that is given must hold; of a list, for each item. An absent argument is refused unless ``optional``.
    """

    argument: Annotated[str, Meta(min_length=1, max_length=256)]
    prefix: str | None = None
    enum: tuple[str | int | float | bool, ...] | None = None
    regex: Annotated[str, Meta(max_length=1_000)] | None = None
    min: float | None = None
    max: float | None = None
    optional: bool = False


class ToolSettings(Struct, frozen=True, kw_only=True):
    """What an entry, or one tool of a server (``overrides``), may say; None keeps the entry's or the default value.

    ``timeout`` is in seconds, from the call to the end of its result. ``max_concurrency`` calls run at once; one more
    waits within its timeout. A result larger than ``max_result_bytes`` (as UTF-8 text) is an error.
    ``on_denied``: ``tell_model`` gives the refusal to the model as the tool's answer, ``end_run`` ends the run (403).
    """

    description: Annotated[str, Meta(max_length=4_096)] | None = None
    timeout: Seconds | None = None
    max_concurrency: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    max_result_bytes: Bytes | None = None
    idempotent: bool | None = None
    read_only: bool | None = None
    allowed_for: AllowedFor | None = None
    rules: tuple[ArgumentRule, ...] | None = None
    on_denied: Literal["tell_model", "end_run"] | None = None


class ToolEntry(ToolSettings, frozen=True, kw_only=True, tag_field="provider"):
    """What every entry has: a ``name``, unique in the file, and `ToolSettings`."""

    name: ToolName
    enabled: bool = True


class LocalTool(ToolEntry, frozen=True, kw_only=True, tag="local"):
    """A Python callable, ``pkg.mod:func``; ``schema`` is made from its signature where it is not given."""

    module: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")]
    schema: dict[str, Any] | None = None


class NetworkAccess(Struct, frozen=True, kw_only=True):
    """Where HTTP calls may go besides public addresses: networks in CIDR form, or host names.

    ``verify_tls`` and ``ca_file`` are about the server's certificate.
    """

    allow_private: tuple[str, ...] = ()
    verify_tls: bool = True
    ca_file: str | None = None


class HttpTool(ToolEntry, frozen=True, kw_only=True, tag="http"):
    """One HTTP request per call.

    ``url`` may hold ``{argument}`` in path and query. Arguments not used there become query parameters (GET, HEAD,
    DELETE) or the JSON body. ``headers`` may hold secrets by reference; ``caller_headers``: see `McpTools`.
    """

    url: str
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    headers: dict[str, Secret] = {}
    caller_headers: dict[str, str] = {}
    schema: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    retries: Annotated[int, Meta(ge=0, le=5)] = 2
    network: NetworkAccess = NetworkAccess()


class OpenApiTools(ToolEntry, frozen=True, kw_only=True, tag="openapi"):
    """The operations of an OpenAPI 3 document, as ``<name>__<operationId>``.

    ``document`` is a path (beside `tools.yaml`, or absolute) or an address. ``include`` and ``exclude`` are fnmatch
    patterns of operation ids. ``overrides`` are settings of one operation, by its id.
    """

    document: str
    server: str | None = None
    headers: dict[str, Secret] = {}
    caller_headers: dict[str, str] = {}
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: dict[str, ToolSettings] = {}
    retries: Annotated[int, Meta(ge=0, le=5)] = 2
    network: NetworkAccess = NetworkAccess()


class McpTools(ToolEntry, frozen=True, kw_only=True, tag="mcp"):
    """The tools of an MCP server, as ``<name>__<tool>``; with ``tool``, that one alone, under the entry's own name.

    ``transport`` follows from ``command`` (stdio) or ``url`` (streamable HTTP) where it is not given. ``stream`` asks
    the server for progress. ``overrides`` are settings of one tool, by the server's name for it. ``pinning``:
    ``first_use`` accepts the first list of the server as it is, ``approve`` waits for an admin even then.

    ``key_headers`` replace ``headers`` for calls of some keys, by fnmatch pattern of the key's id; the first match
    counts. ``caller_headers`` pass a header of the caller's own request on, by name: what the server gets → what the
    caller sent, a header of credentials (`x-cred-…`, `x-aws-…`) or one listed in GATEWAY_CONTEXT_HEADERS, also behind
    a word: ``Bearer x-cred-github-token``.
    """

    transport: Literal["stdio", "http", "sse"] | None = None
    command: tuple[str, ...] = ()
    env: dict[str, Secret] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, Secret] = {}
    key_headers: dict[str, dict[str, Secret]] = {}
    caller_headers: dict[str, str] = {}
    tool: str | None = None
    stream: bool = False
    pinning: Literal["first_use", "approve"] = "first_use"
    max_tools: Annotated[int, Meta(ge=1, le=10_000)] = 200
    connect_timeout: Seconds = 30.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: dict[str, ToolSettings] = {}
    network: NetworkAccess = NetworkAccess()


class JailLimits(Struct, frozen=True, kw_only=True):
    """What one call may use; ``memory_bytes``, ``cpu_seconds`` and ``open_files`` are those of each of its processes.

    ``tmp_bytes`` is the size of `/tmp` and of `/dev/shm`, which are gone after the call.
    """

    memory_bytes: Annotated[int, Meta(ge=64 * 1024 * 1024, le=1024**4)] = 512 * 1024 * 1024
    cpu_seconds: Annotated[int, Meta(ge=1, le=3_600)] = 60
    processes: Annotated[int, Meta(ge=8, le=10_000)] = 64
    open_files: Annotated[int, Meta(ge=16, le=65_536)] = 256
    tmp_bytes: Annotated[int, Meta(ge=4_096, le=1024**4)] = 64 * 1024 * 1024


class JailedTool(ToolEntry, frozen=True, kw_only=True):
    """A tool that runs in a jail, on a workspace: a folder of its caller's (by key), or with ``shared`` of everybody's.

    ``workspace`` is the folder that holds the callers' folders, or is the shared one; without it, `workspaces` in the
    state folder. ``max_workspace_bytes`` and ``max_workspace_files`` bound what one caller's may hold.
    """

    workspace: Annotated[str, Meta(min_length=1)] | None = None
    shared: bool = False
    max_workspace_bytes: Annotated[int, Meta(ge=4_096, le=1024**5)] = 256 * 1024 * 1024
    max_workspace_files: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    limits: JailLimits = JailLimits()


class ShellTool(JailedTool, frozen=True, kw_only=True, tag="shell"):
    """Runs a command line."""


class FileOpsTool(JailedTool, frozen=True, kw_only=True, tag="file_ops"):
    """Reads, writes and searches the files of the workspace."""


class SearchFields(Struct, frozen=True, kw_only=True):
    """Where a search service's answer (JSON) has its results, a list, and what each of them has: ``web.results``."""

    results: str = "results"
    title: str = "title"
    url: str = "url"
    snippet: str = "content"


class ResearchTool(ToolEntry, frozen=True, kw_only=True, tag="research"):
    """Asks a search service, and reads the pages it found.

    ``search_url`` gets the query as ``query_parameter``; ``parameters`` are further ones. ``headers`` are the search
    service's alone. ``network`` is where the service may be, ``page_network`` where pages may.
    """

    search_url: str
    query_parameter: Annotated[str, Meta(min_length=1, max_length=64)] = "q"
    parameters: dict[str, str] = field(default_factory=lambda: {"format": "json"})
    headers: dict[str, Secret] = {}
    fields: SearchFields = SearchFields()
    max_pages: Annotated[int, Meta(ge=0, le=20)] = 5
    max_page_bytes: Bytes = 512 * 1024
    page_timeout: Seconds = 10.0
    network: NetworkAccess = NetworkAccess()
    page_network: NetworkAccess = NetworkAccess()


AnyTool = LocalTool | HttpTool | OpenApiTools | McpTools | ShellTool | FileOpsTool | ResearchTool


class ToolDefaults(Struct, frozen=True, kw_only=True):
    """What holds where neither an entry nor an override says otherwise; see `ToolSettings`."""

    timeout: Seconds = 30.0
    max_concurrency: Annotated[int, Meta(ge=1, le=10_000)] = 16
    max_result_bytes: Bytes = 256 * 1024
    on_denied: Literal["tell_model", "end_run"] = "tell_model"


class Registration(Struct, frozen=True, kw_only=True):
    """What entries that admins make over HTTP may have (`gateway.tools.registered`).

    ``secrets`` are the environment variables they may refer to, ``network`` where inside they may reach.
    """

    enabled: bool = True
    secrets: tuple[str, ...] = ()
    network: NetworkAccess = NetworkAccess()


class ToolsConfig(Struct, frozen=True, kw_only=True):
    """The whole file."""

    version: Literal[1] = 1
    defaults: ToolDefaults = ToolDefaults()
    registration: Registration = Registration()
    tools: tuple[AnyTool, ...] = field(default_factory=tuple)


def load_tools(settings: Settings) -> ToolsConfig:
    """Read `tools.yaml`; without one, no tools. Raises `ConfigError` naming file, line and key."""
    path = settings.config_file(FILE)
    if path is None:
        return ToolsConfig()
    config = load_yaml(path, ToolsConfig)
    seen: set[str] = set()
    for entry in config.tools:
        if entry.name in seen:
            raise ConfigError(f"{FILE}: tools: two entries are called '{entry.name}'; names must differ.")
        seen.add(entry.name)
    return msgspec.structs.replace(config, tools=tuple(_beside(entry, path.parent) for entry in config.tools))


def _beside(entry: AnyTool, folder: Path) -> AnyTool:
    """Return an entry whose relative document, or workspace, is looked for beside the file."""
    if isinstance(entry, JailedTool) and entry.workspace is not None:
        return msgspec.structs.replace(entry, workspace=str(folder / entry.workspace))
    if not isinstance(entry, OpenApiTools) or entry.document.startswith(("http://", "https://")):
        return entry
    return msgspec.structs.replace(entry, document=str(folder / entry.document))
