"""Byte relay: calls whose bodies and answers the gateway does not model (audio, images, moderations, files, batches).

The model, where a call names one, is judged as everywhere. A call without a model goes to an upstream as a whole, and
so needs a key that reaches all of it.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from gateway.admission import agents_chat_only, authorize_model
from gateway.chat import RelayRequest
from gateway.config import Settings
from gateway.errors import GatewayError, NotFound, PermissionDenied, UpstreamMalformed, UpstreamModelNotFound
from gateway.events import RelayedChunk, RelayedHead, RelayEnded, RunEvent, Usage
from gateway.principal import Principal
from gateway.registry.entry import AgentEntry
from gateway.routing.call import NOTHING_SENT
from gateway.run import Run
from gateway.snapshot import Snapshot
from gateway.upstreams.relaying import ByteRequest, ByteTarget, shown_headers
from gateway.usage.measures import NOTHING_MEASURED, SPEECH_PATH, Asked, Measured
from gateway.usage.meter import Meter
from gateway.usage.reported import AnswerUsage

_CONTENT_TYPE = re.compile(rb"[\x20-\x7e]{1,256}")
_BINARY = b"application/octet-stream"


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
    sent: Mapping[str, str] = NOTHING_SENT,
) -> Destination:
    """Return where a call goes: to the model it names, else to an upstream as a whole.

    ``upstream`` is the caller's own choice; calls without a model and without one go to the configured default.
    ``sent`` are the caller's headers of credentials.

    Raises as `authorize_model` does; `UnsupportedValue` for an agent; `PermissionDenied` or `NotFound` for an upstream
    of which the key does not reach every model; `LentKeyMissing`.
    """
    if model is not None:
        target = authorize_model(model, principal, snapshot, upstream=upstream)
        if isinstance(target, AgentEntry):
            raise agents_chat_only(target)
        return Destination(target.upstream.for_caller(sent), model, target.model)
    table = snapshot.upstreams
    found = table.upstreams.get(upstream) if upstream is not None else table.default
    hidden = snapshot.keyring.hide_foreign_models
    allowed = principal.is_drop_in or (found is not None and snapshot.access.allows_all(principal, f"{found.name}/"))
    if found is not None and not principal.is_drop_in:
        snapshot.metrics.access_decided("upstream", allowed)
    if found is not None and allowed:
        return Destination(found.for_caller(sent), f"{found.name}/*", None)
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
    end_user: str | None = None,
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
        end_user=end_user,
    )


class ByteRelayExecutor:
    """Relays one call; yields `RelayedHead`, the answer's bytes, `RelayEnded`.

    ``asked`` says what the request asks for, as far as it has been read.
    """

    def __init__(
        self,
        destination: Destination,
        request: ByteRequest,
        meter: Meter | None = None,
        *,
        asked: Callable[[], Asked] | None = None,
    ) -> None:
        self._upstream = destination.upstream
        self._name = destination.name
        self._request = request
        self._meter = meter or Meter()
        self._asked = asked or (lambda: Asked(request.path))

    async def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """See `gateway.run.Executor.execute`."""
        assert isinstance(run.request, RelayRequest), "made by `byte_run`"
        path = run.request.path
        heads: list[RelayedHead] = []
        answer = AnswerUsage(None)
        held: bytes | None = None
        usage: Usage | None = None
        is_answered = False

        def on_head(status: int, headers: Mapping[bytes, bytes]) -> None:
            heads.append(RelayedHead(shown_headers(headers), status, self._content_type(headers)))

        try:
            pieces = self._upstream.relay(self._request, request_id=run.request_id, on_head=on_head)
            async with aclosing(pieces):
                async for piece in pieces:
                    if not is_answered:
                        is_answered = True
                        answer = AnswerUsage(heads[-1].content_type)
                        answer.feed(piece)
                        if answer.is_json:
                            held = piece  # perhaps all of it: then its cost goes out with its head
                        else:
                            yield msgspec.structs.replace(heads.pop(), usage=self._known_before(path))
                            yield RelayedChunk(piece)
                        continue
                    answer.feed(piece)
                    if held is not None:
                        yield heads.pop()
                        yield RelayedChunk(held)
                        held = None
                    yield RelayedChunk(piece)
            is_answered = True
        except GatewayError as error:
            error.is_relayed = True
            if isinstance(error, UpstreamModelNotFound) and "{" in path:
                raise NotFound(f"The upstream '{self._upstream.name}' has nothing of this id.") from error
            raise
        finally:
            # Also for an answer that is cut, or that nobody waits for: the upstream counts it, too.
            if is_answered and self._name is not None:
                usage = self._charged(run, path, answer)
        if heads:
            yield msgspec.structs.replace(heads.pop(), usage=usage)
        if held is not None:
            yield RelayedChunk(held)
        yield RelayEnded("stop", usage)

    def _known_before(self, path: str) -> Usage | None:
        """Return what the answer will use where the request alone says so: speech, by its text."""
        if path != SPEECH_PATH or self._name is None:
            return None
        measured = self._asked().answered(NOTHING_MEASURED, 0)
        usage = Usage(requests=1, estimated=measured.estimated)
        return self._meter.priced(usage, self._upstream.name, self._name, measured)

    def _charged(self, run: Run, path: str, answer: AnswerUsage) -> Usage | None:
        """Charge the call; return its usage if anything is known of it. A call that names no model uses nothing."""
        assert self._name is not None, "asked before"
        usage = answer.find()
        measured = Measured()
        if usage is None or not usage.total_tokens:
            measured = self._asked().answered(answer.measured(), answer.written_characters())
            usage = usage or Usage(requests=1, estimated=measured.estimated)
        usage = self._meter.charge(
            usage,
            run,
            upstream=self._upstream.name,
            model=self._name,
            path=path,
            measured=measured,
            byok=self._upstream.is_lent,
        )
        if run.reservation is not None:
            run.reservation.settle(usage)
        return usage if usage.total_tokens or usage.cost is not None else None

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
