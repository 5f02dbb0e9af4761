"""The operations of an OpenAPI 3 document as tools, sent through the guarded network.

`openapi_pydantic` judges whether the document is one and finds its operations; schemas are taken from the document
itself, with what they refer to beside them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

import msgspec
import openapi_pydantic
import openapi_pydantic.v3.v3_0 as openapi_3_0
import pydantic
import yaml

from gateway.errors import ConfigError, GatewayError, InvalidToolArguments, ToolFailed, ToolUnavailable
from gateway.observability.logs import log_event
from gateway.tools.config import FILE, OpenApiTools
from gateway.tools.http import HttpCall, HttpClient, UrlTemplate, as_text, checked_headers, with_query
from gateway.tools.lending import check_caller_headers, lent_headers
from gateway.tools.network import Resolve
from gateway.tools.port import ProviderHealth, ProviderKind, ToolContext, ToolResult, ToolSpec

_log = logging.getLogger("gateway.tools")

LARGEST_DOCUMENT = 8 * 1024 * 1024
_FETCH_S = 20.0
_MOST_OPERATIONS = 500
_MOST_DEFINITIONS = 200
_METHODS = ("get", "put", "post", "delete", "head", "patch")
_SAFE = frozenset({"get", "head"})
_IDEMPOTENT = frozenset({"get", "head", "put", "delete"})
_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json(?:;.*)?", re.IGNORECASE)
_NAME_SAFE = re.compile(r"[^A-Za-z0-9_-]+")
_NEVER = frozenset({"authorization", "host", "cookie", "content-length", "transfer-encoding", "connection"})


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter: ``argument`` is its name among the tool's arguments."""

    argument: str
    name: str
    place: str
    required: bool
    explode: bool


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One operation as a tool: what becomes of its arguments."""

    spec: ToolSpec
    method: str
    template: UrlTemplate
    parameters: tuple[Parameter, ...]
    body: str | None
    media_type: str


class OpenApiProvider:
    """One entry of provider ``openapi``: a document read once, at `open`."""

    kind: ProviderKind = "openapi"

    def __init__(self, config: OpenApiTools, *, max_connections: int, resolve: Resolve | None = None) -> None:
        """Raise `ConfigError` for headers or a network that cannot be used."""
        self.entry = config.name
        self._config = config
        self._where = f"{FILE}: {config.name}"
        self._headers = checked_headers(config.headers, where=self._where)
        check_caller_headers(config.caller_headers, self._where)
        self._client = HttpClient(
            config.network, max_connections=max_connections, retries=config.retries, resolve=resolve
        )
        self._operations: dict[str, Operation] = {}
        self._problem: str | None = None

    async def open(self) -> None:
        """Read the document. A file that is wrong is a `ConfigError`; an address that does not answer is `health`."""
        if not self._config.document.startswith(("http://", "https://")):
            self._operations = self._read(_file(self._config.document, self._where), None)
            return
        try:
            self._operations = self._read(await self._fetch(), self._config.document)
        except GatewayError as error:
            self._problem = error.message
            log_event(_log, "tool.document.failed", level=logging.ERROR, entry=self.entry, message=error.message)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the operations that ``include`` and ``exclude`` leave."""
        return tuple(operation.spec for operation in self._operations.values())

    async def refresh(self) -> None:
        """Do nothing: a refresh makes a new provider, which reads the document again."""

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Send the operation's request; see `ToolProvider.call`."""
        operation = self._operations.get(tool.name)
        if operation is None:
            raise ToolUnavailable(f"The tool '{tool.name}' is no longer in its document.")
        lent = lent_headers(self._config.caller_headers, context, f"The tool '{tool.name}'")
        request = self._request(operation, arguments, lent)
        return await self._client.send(request, context, idempotent=tool.idempotent)

    def health(self) -> ProviderHealth:
        """Return whether the document was read, and how the latest request went."""
        if self._problem is not None:
            return ProviderHealth(status="down", detail=self._problem, checked_at=time.time())
        return self._client.health

    def _request(self, operation: Operation, arguments: Mapping[str, Any], lent: Mapping[str, str]) -> HttpCall:
        headers, query, path = {**self._headers, **lent}, {}, {}
        for parameter in operation.parameters:
            if parameter.argument not in arguments:
                continue
            value = arguments[parameter.argument]
            if parameter.place == "path":
                path[parameter.name] = value if not isinstance(value, list) else ",".join(map(as_text, value))
            elif parameter.place == "query":
                is_joined = isinstance(value, list) and not parameter.explode
                query[parameter.name] = ",".join(map(as_text, value)) if is_joined else value
            else:
                text = as_text(value)
                if not text.isascii() or not text.isprintable():
                    raise InvalidToolArguments(
                        f"arguments.{parameter.argument}: a header holds printable ASCII alone.", param="arguments"
                    )
                headers.setdefault(parameter.name.lower(), text)
        url, _ = operation.template.fill(path)
        body = None
        if operation.body is not None and operation.body in arguments:
            body = msgspec.json.encode(arguments[operation.body])
            headers.setdefault("content-type", operation.media_type)
        headers.setdefault("accept", "application/json, text/*;q=0.5")
        return HttpCall(method=operation.method.upper(), url=with_query(url, query), headers=headers, body=body)

    async def _fetch(self) -> bytes:
        template = UrlTemplate(self._config.document, where=f"{self._where}: document")
        url, _ = template.fill({})
        result = await self._client.fetch(
            HttpCall(method="GET", url=url, headers=dict(self._headers)), limit=LARGEST_DOCUMENT, timeout_s=_FETCH_S
        )
        if result[0] != 200:
            raise ToolFailed(f"{self._where}: document: its server answered with HTTP {result[0]}.")
        return result[1]

    def _read(self, raw: bytes, address: str | None) -> dict[str, Operation]:
        document = _parsed(raw, self._where)
        server = self._server(document, address)
        found: dict[str, Operation] = {}
        for path, method, operation, shared in _operations(document):
            key = operation.get("operationId") or f"{method}{path}"
            if not isinstance(key, str) or not self._wants(key):
                continue
            name = _tool_name(self.entry, key)
            if name in found:
                raise ConfigError(f"{self._where}: two operations are called '{name}'; exclude one.")
            if len(found) >= _MOST_OPERATIONS:
                raise ConfigError(f"{self._where}: more than {_MOST_OPERATIONS} operations; narrow them with include.")
            try:
                found[name] = _operation(name, key, self.entry, server + path, method, operation, shared, document)
            except (ConfigError, KeyError, TypeError, AttributeError) as error:
                reason = error.message if isinstance(error, ConfigError) else "a reference in it leads nowhere"
                log_event(
                    _log, "tool.operation.skipped", level=logging.WARNING, entry=self.entry, tool_name=name,
                    message=f"The operation '{key[:100]}' is not offered: {reason}",
                )  # fmt: skip
        return found

    def _wants(self, key: str) -> bool:
        config = self._config
        return any(fnmatchcase(key, pattern) for pattern in config.include) and not any(
            fnmatchcase(key, pattern) for pattern in config.exclude
        )

    def _server(self, document: Mapping[str, Any], address: str | None) -> str:
        """Return where requests go: the entry's ``server``, else the document's first, which may be relative."""
        given = self._config.server
        if given is None:
            servers = document.get("servers") or [{"url": "/"}]
            given = str(servers[0].get("url", "/"))
            for name, variable in (servers[0].get("variables") or {}).items():
                given = given.replace(f"{{{name}}}", str(variable.get("default", "")))
            if address is not None:
                given = urljoin(address, given)
        if not given.startswith(("http://", "https://")):
            raise ConfigError(f"{self._where}: the document does not say where its server is; write 'server'.")
        UrlTemplate(given, where=f"{self._where}: server")
        return given.rstrip("/")


def _file(name: str, where: str) -> bytes:
    try:
        path = Path(name)
        if path.stat().st_size > LARGEST_DOCUMENT:
            raise ConfigError(f"{where}: document: more than {LARGEST_DOCUMENT:,} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: document: {Path(name).name} cannot be read ({error.strerror}).") from error


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    """Return the document as plain values, judged by the library's models."""
    try:
        text = raw.decode("utf-8-sig")
        is_json = text.lstrip().startswith("{")
        document = msgspec.json.decode(text) if is_json else yaml.load(text, Loader=_NoAliases)
        version = str(document["openapi"])
        models: Any = openapi_3_0 if version.startswith("3.0") else openapi_pydantic
        models.OpenAPI.model_validate(document)
    except (yaml.YAMLError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: document: neither JSON nor YAML.") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = "/".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: document: {place}: {first['msg']}.") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: document: no OpenAPI 3 document ('openapi: 3…' is missing).") from error
    return dict(document)


class _NoAliases(yaml.SafeLoader):
    """YAML without aliases, with which a small file becomes a huge value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], list[Any]]]:
    for path, item in (document.get("paths") or {}).items():
        if not isinstance(item, dict):
            continue
        shared = item.get("parameters") or []
        for method in _METHODS:
            operation = item.get(method)
            if isinstance(operation, dict):
                yield path, method, operation, shared


def _operation(
    name: str,
    key: str,
    entry: str,
    url: str,
    method: str,
    operation: dict[str, Any],
    shared: list[Any],
    document: dict[str, Any],
) -> Operation:
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for item in (*shared, *(operation.get("parameters") or [])):
        found = _followed(item, document)
        merged[found["name"], found["in"]] = found
    properties: dict[str, Any] = {}
    required: list[str] = []
    parameters = []
    for (parameter_name, place), item in merged.items():
        if place == "cookie" or (place == "header" and parameter_name.lower() in _NEVER):
            if item.get("required"):
                raise ConfigError(f"its parameter '{parameter_name}' is a secret's place; send it with 'headers'.")
            continue
        argument = parameter_name if parameter_name not in properties else f"{place}_{parameter_name}"
        content: dict[str, Any] = next(iter((item.get("content") or {}).values()), {})
        schema = item.get("schema") or content.get("schema") or {}
        properties[argument] = _described(schema, item.get("description"))
        is_required = bool(item.get("required")) or place == "path"
        if is_required:
            required.append(argument)
        parameters.append(
            Parameter(
                argument=argument,
                name=parameter_name,
                place=place,
                required=is_required,
                explode=item.get("explode", place == "query"),
            )
        )
    body, media_type = _body(operation, document, properties, required)
    parameters_schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        parameters_schema["required"] = required
    summary, text = operation.get("summary") or "", operation.get("description") or ""
    return Operation(
        spec=ToolSpec(
            name=name,
            entry=entry,
            provider="openapi",
            remote_name=key,
            title=summary[:200] or None,
            description=(f"{summary}\n{text}".strip() or f"{method.upper()} {key}")[:4_000],
            parameters=_with_definitions(parameters_schema, document),
            idempotent=method in _IDEMPOTENT,
            read_only=method in _SAFE,
            address=url,
            method=method.upper(),
        ),
        method=method,
        template=UrlTemplate(_escaped(url, merged), where=f"the operation '{key}'"),
        parameters=tuple(parameters),
        body=body,
        media_type=media_type,
    )


def _body(
    operation: dict[str, Any], document: dict[str, Any], properties: dict[str, Any], required: list[str]
) -> tuple[str | None, str]:
    """Add the request's body to the properties, as the argument ``body``; return its name and media type."""
    if "requestBody" not in operation:
        return None, ""
    body = _followed(operation["requestBody"], document)
    media_type = next((kind for kind in body.get("content") or {} if _JSON.fullmatch(kind)), None)
    if media_type is None:
        if not body.get("required"):
            return None, ""
        raise ConfigError("its body is not JSON.")
    argument = "body" if "body" not in properties else "request_body"
    properties[argument] = _described(body["content"][media_type].get("schema") or {}, body.get("description"))
    if body.get("required"):
        required.append(argument)
    return argument, media_type


def _escaped(url: str, parameters: Mapping[tuple[str, str], Any]) -> str:
    """Return the address of an operation, escaped but for the places of its path parameters."""
    names = {name for name, place in parameters if place == "path"}
    missing = set(re.findall(r"\{([^{}]*)\}", url)) - names
    if missing:
        raise ConfigError(f"its path parameter '{min(missing)[:64]}' is not described.")
    if any(not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) for name in names):
        raise ConfigError("a path parameter's name is none that can be filled in.")
    return quote(url, safe=":/?#[]@!$&'()*+,;=%{}")


def _followed(item: Any, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object of the document, or what it refers to; references elsewhere are not followed."""
    for _ in range(8):
        if "$ref" not in item:
            return dict(item)
        item = _at(item["$ref"], document)
    raise ConfigError("a reference in it refers to itself.")


def _at(reference: str, document: Mapping[str, Any]) -> Any:
    if not reference.startswith("#/"):
        raise ConfigError(f"it refers to another document ({reference[:80]}), which is not read.")
    node: Any = document
    for part in reference[2:].split("/"):
        node = node[part.replace("~1", "/").replace("~0", "~")]
    return node


def _with_definitions(schema: dict[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that stands alone: what it refers to is beside it, under ``$defs``."""
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def rewritten(node: Any, depth: int = 0) -> Any:
        if depth > 60:
            raise ConfigError("its schema is too deep.")
        if isinstance(node, list):
            return [rewritten(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref")
        if isinstance(reference, str):
            return {"$ref": f"#/$defs/{defined(reference)}"}
        return _as_2020({key: rewritten(value, depth + 1) for key, value in node.items()})

    def defined(reference: str) -> str:
        if reference not in names:
            if len(names) >= _MOST_DEFINITIONS:
                raise ConfigError("its schema refers to too much.")
            base = _NAME_SAFE.sub("_", reference.rpartition("/")[2])[:60] or "schema"
            names[reference] = base if base not in definitions else f"{base}_{len(names)}"
            definitions[names[reference]] = {}
            definitions[names[reference]] = rewritten(_at(reference, document))
        return names[reference]

    whole: dict[str, Any] = rewritten(schema)
    if definitions:
        whole["$defs"] = definitions
    return whole


def _as_2020(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of OpenAPI 3.0 in JSON Schema's words; one of 3.1 is in them already."""
    for bound, other in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(bound), bool) and schema.pop(bound) and other in schema:
            schema[bound] = schema.pop(other)
    for name in ("xml", "externalDocs", "discriminator", "example"):
        if name in schema and "type" in schema:
            schema.pop(name)
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        schema = {**schema, "type": [schema["type"], "null"]}
        schema.pop("nullable")
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    return schema


def _described(schema: Mapping[str, Any], description: Any) -> dict[str, Any]:
    if isinstance(description, str) and "$ref" not in schema and "description" not in schema:
        return {**schema, "description": description[:1_000]}
    return dict(schema)


def _tool_name(entry: str, key: str) -> str:
    clean = _NAME_SAFE.sub("_", key).strip("_")
    return f"{entry}__{clean}"[:64]
