"""Byte relay: calls whose bodies and answers the gateway does not model (audio, images, moderations, files, batches).

The model, where a call names one, is judged as everywhere. A call without a model goes to an upstream as a whole, and
so needs a key that reaches all of it.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from gateway.admission import agents_chat_only, authorize_model
from gateway.chat import RelayRequest
from gateway.config import Settings
from gateway.errors import GatewayError, NotFound, PermissionDenied, UpstreamMalformed, UpstreamModelNotFound
from gateway.events import RelayedChunk, RelayedHead, RelayEnded, RunEvent, Usage
from gateway.principal import Principal
from gateway.registry.entry import AgentEntry
from gateway.run import Run
from gateway.snapshot import Snapshot
from gateway.upstreams.relaying import ByteRequest, ByteTarget, shown_headers
from gateway.usage.meter import Meter
from gateway.usage.reported import AnswerUsage

_CONTENT_TYPE = re.compile(rb"[\x20-\x7e]{1,256}")
_BINARY = b"application/octet-stream"


class _Binding(Protocol):
    @property
    def upstream(self) -> ByteTarget: ...

    @property
    def model(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a call goes. ``model`` is the canonical id for logs and metrics, ``name`` what the upstream calls it."""

    upstream: ByteTarget
    model: str
    name: str | None


def choose_destination(
    model: str | None,
    principal: Principal,
    snapshot: Snapshot,
    *,
    upstream: str | None = None,
) -> Destination:
    """Return where a call goes: to the model it names, else to an upstream as a whole.

    ``upstream`` is the caller's own choice; calls without a model and without one go to the configured default.

    Raises as `authorize_model` does; `UnsupportedValue` for an agent; `PermissionDenied` or `NotFound` for an upstream
    of which the key does not reach every model.
    """
    if model is not None:
        target = authorize_model(model, principal, snapshot, upstream=upstream)
        if isinstance(target, AgentEntry):
            raise agents_chat_only(target)
        binding: _Binding = target
        return Destination(binding.upstream, model, binding.model)
    table = snapshot.upstreams
    found = table.upstreams.get(upstream) if upstream is not None else table.default
    hidden = snapshot.keyring.hide_foreign_models
    if found is not None and (principal.is_drop_in or snapshot.access.allows_all(principal, f"{found.name}/")):
        return Destination(found, f"{found.name}/*", None)
    if found is None or hidden:
        name = f"'{(upstream or '')[:64]}' " if upstream is not None else ""
        raise NotFound(
            f"There is no upstream {name}that your key reaches. Name one in the header x-gateway-upstream, or a model "
            "in the request."
        )
    raise PermissionDenied(
        f"A request without a model reaches all of the upstream '{found.name}', and the key '{principal.key_id}' does "
        f"not. Its owner adds '{found.name}/*' to allow_agents, or the request names a model."
    )


def byte_run(
    destination: Destination,
    path: str,
    *,
    principal: Principal,
    request_id: str,
    settings: Settings,
    headers: Mapping[str, str] | None = None,
) -> Run:
    """Return the run of one byte relay; ``path`` is the route's template."""
    return Run(
        id=uuid.uuid4(),
        request_id=request_id,
        principal=principal,
        model=destination.model,
        request=RelayRequest(model=destination.model, fields={}, path=path),
        streamed=False,
        created=int(time.time()),
        deadline_s=settings.run_timeout_s,
        headers=headers or {},
    )


class ByteRelayExecutor:
    """Relays one call; yields `RelayedHead`, the answer's bytes, `RelayEnded`."""

    def __init__(self, destination: Destination, request: ByteRequest, meter: Meter | None = None) -> None:
        self._upstream = destination.upstream
        self._name = destination.name
        self._request = request
        self._meter = meter or Meter()

    async def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """See `gateway.run.Executor.execute`."""
        assert isinstance(run.request, RelayRequest), "made by `byte_run`"
        heads: list[RelayedHead] = []
        spent: AnswerUsage | None = None

        def on_head(status: int, headers: Mapping[bytes, bytes]) -> None:
            heads.append(RelayedHead(shown_headers(headers), status, self._content_type(headers)))

        try:
            pieces = self._upstream.relay(self._request, request_id=run.request_id, on_head=on_head)
            async with aclosing(pieces):
                async for piece in pieces:
                    if heads:
                        spent = AnswerUsage(heads[-1].content_type)
                        yield heads.pop()
                    if spent is not None:
                        spent.feed(piece)
                    yield RelayedChunk(piece)
            if heads:
                yield heads.pop()
        except GatewayError as error:
            error.is_relayed = True
            if isinstance(error, UpstreamModelNotFound) and "{" in run.request.path:
                raise NotFound(f"The upstream '{self._upstream.name}' has nothing of this id.") from error
            raise
        usage = spent.find() if spent is not None else None
        yield RelayEnded("stop", self._charged(run, run.request.path, usage))

    def _charged(self, run: Run, path: str, usage: Usage | None) -> Usage | None:
        """Return the usage with its cost. A call that names no model, such as for a file, uses none."""
        if self._name is None:
            return None
        if usage is None:
            self._meter.count(run, upstream=self._upstream.name, model=self._name, path=path)
            return None
        usage = self._meter.charge(usage, run, upstream=self._upstream.name, model=self._name, path=path)
        if run.reservation is not None:
            run.reservation.settle(usage)
        return usage

    def _content_type(self, headers: Mapping[bytes, bytes]) -> bytes:
        """Return the answer's type. A page is a login portal's, or a file that must not run in a browser here."""
        given = headers.get(b"content-type", _BINARY)
        kind = given.partition(b";")[0].strip().lower()
        if kind not in (b"text/html", b"application/xhtml+xml", b"image/svg+xml"):
            return given if _CONTENT_TYPE.fullmatch(given) else _BINARY
        if self._request.path.partition("?")[0].endswith("/content"):
            return _BINARY
        raise UpstreamMalformed(
            f"The upstream '{self._upstream.name}' answered with a web page. See whether its base_url is right."
        )
