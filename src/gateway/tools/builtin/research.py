"""The built-in tool `research`: asks the operator's search service, and reads the pages that it found.

No address comes from the model: the service is the operator's choice, the pages are the service's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from gateway.errors import ConfigError, ToolFailed
from gateway.tools.builtin.pages import Page, PageFailed, PageReader, checked
from gateway.tools.config import ResearchTool
from gateway.tools.http import HttpCall, HttpClient, UrlTemplate, checked_headers, with_query
from gateway.tools.port import ProviderHealth, ProviderKind, ToolContext, ToolResult, ToolSpec

_LARGEST_ANSWER = 2 * 1024 * 1024
_MOST_RESULTS = 20
_SNIPPET_CHARS = 500
_DESCRIPTION = (
    "Search the web and read the best pages. The answer is JSON: results, each with title, url, snippet, and of the "
    "first pages the text, or why it cannot be read (error)."
)


class _Found(Struct, frozen=True, kw_only=True):
    title: str
    url: str
    snippet: str


class ResearchProvider:
    """One search service, and the web behind it."""

    kind: ProviderKind = "research"

    def __init__(self, config: ResearchTool, *, max_connections: int) -> None:
        """Raise `ConfigError` for a wrong address, header or network."""
        self.entry = config.name
        self._config = config
        where = f"tools.yaml: {config.name}"
        if UrlTemplate(config.search_url, where=f"{where}: search_url").names:
            raise ConfigError(f"{where}: search_url: the query goes into query_parameter; leave {{…}} out.")
        self._headers = {"accept": "application/json", **checked_headers(config.headers, where=where)}
        self._client = HttpClient(config.network, max_connections=max_connections, retries=1)
        self._pages = PageReader(
            config.page_network,
            most_bytes=config.max_page_bytes,
            max_connections=max(1, max_connections * config.max_pages),
        )

    async def open(self) -> None:
        """Do nothing: connections are made by calls."""

    async def aclose(self) -> None:
        """Close the connections."""
        await asyncio.gather(self._client.aclose(), self._pages.aclose())

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the one tool."""
        config = self._config
        most = config.max_pages
        return (
            ToolSpec(
                name=self.entry,
                entry=self.entry,
                provider="research",
                remote_name=self.entry,
                description=config.description or _DESCRIPTION,
                parameters={
                    "type": "object",
                    "required": ["query"],
                    "properties": {
                        "query": {"type": "string", "minLength": 1, "maxLength": 500},
                        "pages": {
                            "type": "integer",
                            "minimum": 0,
                            "maximum": most,
                            "description": f"How many of the pages found are read; {min(3, most)} unless given.",
                        },
                    },
                },
                idempotent=True,
                read_only=True,
                address=config.search_url.partition("?")[0],
                method="GET",
            ),
        )

    async def refresh(self) -> None:
        """Do nothing: there is nobody to ask."""

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Search, then read; see `ToolProvider.call`."""
        query = arguments["query"]
        url = with_query(self._config.search_url, {**self._config.parameters, self._config.query_parameter: query})
        answer = await self._client.send(
            HttpCall(method="GET", url=url, headers=self._headers),
            msgspec.structs.replace(context, max_result_bytes=_LARGEST_ANSWER),
            idempotent=True,
        )
        if answer.is_error:
            return ToolResult(
                text=f"The search service failed: {answer.text}"[: context.max_result_bytes // 4], is_error=True
            )
        found = self._results(answer.structured)
        wanted = found[: arguments.get("pages", min(3, self._config.max_pages))]
        seconds = min(self._config.page_timeout, context.seconds_to_work())
        pages = await asyncio.gather(*(self._page(item.url, seconds) for item in wanted))
        return _fitted(query, found, pages, context.max_result_bytes)

    def health(self) -> ProviderHealth:
        """Return how the latest question to the search service went."""
        return self._client.health

    def _results(self, answer: Any) -> list[_Found]:
        """Return what the service found, without what has no address of a page, and without repetitions."""
        fields = self._config.fields
        items = _at(answer, fields.results)
        if not isinstance(items, list):
            raise ToolFailed(
                f"The search service's answer has no list at '{fields.results}'. It has to answer in JSON; the "
                "operator says where its results are with 'fields' in tools.yaml."
            )
        found: dict[str, _Found] = {}
        for item in items:
            url = _text(_at(item, fields.url))
            try:
                url = checked(url)
            except PageFailed:
                continue
            if url not in found and len(found) < _MOST_RESULTS:
                title, snippet = (_text(_at(item, path)) for path in (fields.title, fields.snippet))
                found[url] = _Found(title=title[:300], url=url, snippet=snippet[:_SNIPPET_CHARS])
        return list(found.values())

    async def _page(self, url: str, seconds: float) -> Page | str:
        """Return a page, or why it cannot be read."""
        try:
            return await self._pages.read(url, seconds=seconds)
        except PageFailed as error:
            return str(error)


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _fitted(query: str, found: Sequence[_Found], pages: Sequence[Page | str], limit: int) -> ToolResult:
    """Return what was found in as many bytes as there may be: pages are cut first, then the last results go."""
    results = list(found)
    share = limit // max(1, len(pages))
    while True:
        shown = []
        for number, item in enumerate(results):
            about: dict[str, Any] = msgspec.to_builtins(item)
            page = pages[number] if number < len(pages) else None
            if isinstance(page, str):
                about["error"] = page
            elif page is not None:
                about["title"] = item.title or page.title
                about |= {"text": page.text[:share], "truncated": page.is_cut or len(page.text) > share}
            shown.append(about)
        value = {"query": query, "results": shown, "truncated": len(results) < len(found)}
        text = msgspec.json.encode(value)
        if len(text) <= limit:
            return ToolResult(text=text.decode(), structured=value)
        if share > 200:
            share = share * 3 // 4
        elif results:
            results.pop()
        else:
            return ToolResult(text="The results are larger than this tool may answer with.", is_error=True)
