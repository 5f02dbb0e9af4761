"""Handlers of the relayed surfaces: who may, where to, and the bytes both ways."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import msgspec

from api.chat_completions.encoder import encode_error, limit_headers, spending_headers
from api.chat_completions.routes import serve_model_call
from api.dependencies import end_user, read_body
from api.errors import public
from api.relayed.multipart import FormRewriter, find_boundary
from api.relayed.upload import Upload
from api.routing import Handler, Headers, Request, Response
from api.sse import STALL_S, ClientGone, Connection
from gateway.admission import end_user_of, lent_keys
from gateway.chat import COMPLETIONS_PATH, EMBEDDINGS_PATH, decode_body, decode_model, decode_value
from gateway.errors import GatewayError, InvalidRequest
from gateway.events import RelayedChunk, RelayedHead, RelayEnded, RunEvent
from gateway.observability.logs import log_event
from gateway.reserving import reserve_relay
from gateway.runs.byte_relay import ByteRelayExecutor, Destination, byte_run, choose_destination
from gateway.upstreams.relaying import ByteRequest
from gateway.usage.measures import ASKED_FIELDS, Asked, asked_of

NamesModel = Literal["always", "perhaps", "never"]
"""Whether the requests of a surface name a model. Where there is none, they go to an upstream as a whole."""

_log = logging.getLogger("api.relayed")
_PARAMETER = re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]{1,256}")
_QUERY = re.compile(rb"[!-~]{0,4096}")
_CONTENT_TYPE = re.compile(r"[ -~]{1,256}")


class _Prepared(NamedTuple):
    """Where a request goes, what goes there, and what it asks for, as far as it has been read."""

    destination: Destination
    outgoing: ByteRequest
    asked: Callable[[], Asked]
    end_user: str | None = None


async def create_completion(request: Request) -> Response | None:
    """Complete a text with a raw model."""
    return await serve_model_call(request, COMPLETIONS_PATH)


async def create_embedding(request: Request) -> Response | None:
    """Embed texts with a raw model."""
    return await serve_model_call(request, EMBEDDINGS_PATH)


def relayed(path: str, *, model: NamesModel) -> Handler:
    """Return the handler of one surface; ``path`` follows the upstream's base URL, with the route's parameters."""

    async def handle(request: Request) -> Response | None:
        upload = Upload(request)
        try:
            with Connection(upload.receive) as connection:
                upload.connection = connection
                destination, outgoing, asked, named = await _prepare(request, upload, path, model)
                run = byte_run(
                    destination,
                    path,
                    principal=request.caller,
                    request_id=request.request_id,
                    settings=request.gateway.settings,
                    end_user=end_user(request) or named,
                )
                if run.principal.allowance is not None:
                    limiter, snapshot = request.gateway.limiter, request.gateway.holder.current
                    run = await reserve_relay(run, destination.upstream, destination.name, asked(), limiter, snapshot)
                answer = _Answer(request, limit_headers(run))
                executor = ByteRelayExecutor(destination, outgoing, request.gateway.holder.current.meter, asked=asked)
                try:
                    await request.gateway.engine.execute(run, executor, answer.take)
                except GatewayError as error:
                    if not answer.is_event_stream:
                        raise
                    # An event that was cut is ended first, else the error would be its last words.
                    await answer.send(b"\n\n" + encode_error(public(error)), more=False)
        except ClientGone:
            log_event(_log, "http.client.gone", model=path)
        return None

    return handle


async def _prepare(request: Request, upload: Upload, path: str, model: NamesModel) -> _Prepared:
    """Judge the request."""
    target = _target(request, path, with_query=model == "never")
    method = "GET" if request.scope["method"] == "HEAD" else request.scope["method"]
    accept = request.headers.get("accept", "*/*")
    accept = accept if _CONTENT_TYPE.fullmatch(accept) else "*/*"
    snapshot = request.gateway.holder.current

    def choose(name: str | None) -> Destination:
        return choose_destination(
            name,
            request.caller,
            snapshot,
            upstream=request.headers.get("x-gateway-upstream"),
            sent=lent_keys(request.headers, request.caller, snapshot),
        )

    if method != "POST":
        upload.finish()
        return _Prepared(choose(None), ByteRequest(method, target, accept=accept), lambda: Asked(path))
    given = request.headers.get("content-type", "application/json")
    kind = given.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        if model == "never":
            find_boundary(given)
            destination = choose(None)
            if not _CONTENT_TYPE.fullmatch(given):
                raise InvalidRequest("The content type has characters that a header cannot carry.")
            body = upload.pieces()
            outgoing = ByteRequest(method, target, body, given, accept, upload.declared)
            return _Prepared(destination, outgoing, lambda: Asked(path))
        return await _prepare_form(request, upload, ByteRequest(method, target, accept=accept), choose, model)
    if kind != "application/json":
        raise InvalidRequest(f"Send application/json or multipart/form-data, not {kind[:64]!r}.", status=415)
    text = await read_body(request)
    upload.finish()
    if model == "never":
        if text:
            decode_body(text)
        outgoing = ByteRequest(method, target, text, "application/json" if text else None, accept)
        return _Prepared(choose(None), outgoing, lambda: Asked(path))
    fields = decode_body(text)
    name = decode_model(fields) if model == "always" or bytes(fields.get("model", b"null")) != b"null" else None
    destination = choose(name)
    asked = asked_of(path, {key: decode_value(fields[key], key) for key in ASKED_FIELDS if key in fields})
    renamed: dict[str, Any] = {str(key): raw for key, raw in fields.items()}
    if name is not None:
        renamed["model"] = destination.name
    outgoing = ByteRequest(method, target, msgspec.json.encode(renamed), "application/json", accept)
    return _Prepared(destination, outgoing, lambda: asked, end_user_of(fields))


async def _prepare_form(
    request: Request,
    upload: Upload,
    draft: ByteRequest,
    choose: Callable[[str | None], Destination],
    model: NamesModel,
) -> _Prepared:
    """Read the form up to its field ``model``; what follows is relayed as it comes."""
    chosen: list[Destination] = []

    def rename(name: str) -> str:
        chosen.append(choose(name))
        return chosen[0].name or name

    form = FormRewriter(find_boundary(request.headers["content-type"]), rename)
    limit, size, begun = request.gateway.settings.body_limit_bytes, 0, list[bytes]()
    pieces = upload.pieces()

    def asked() -> Asked:
        most = request.gateway.settings.upload_limit_bytes
        return asked_of(
            draft.path, form.noted, upload.size if upload.complete else upload.declared or most, is_whole=form.ended
        )

    try:
        async for piece in pieces:
            begun.append(form.feed(piece))
            size += len(piece)
            if form.model is not None:
                break
            if size > limit:
                raise InvalidRequest(
                    f"The form's field 'model' does not come within {limit:,} bytes. Put it before the file.",
                    param="model",
                )
        if upload.complete:
            form.finish()
        if form.model is None and model == "always":
            raise InvalidRequest("you must provide a model parameter", param="model")
        destination = chosen[0] if chosen else choose(None)
    except BaseException:
        await pieces.aclose()
        raise
    if upload.complete:
        await pieces.aclose()
        outgoing = replace(draft, body=b"".join(begun), content_type=form.content_type)
        return _Prepared(destination, outgoing, asked, form.noted.get("user"))
    length = None if upload.declared is None or form.growth is None else upload.declared + form.growth
    body = _rest(form, begun, pieces)
    outgoing = replace(draft, body=body, content_type=form.content_type, length=length)
    return _Prepared(destination, outgoing, asked, form.noted.get("user"))


async def _rest(
    form: FormRewriter, begun: list[bytes], pieces: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield b"".join(begun)
        begun.clear()
        async for piece in pieces:
            yield form.feed(piece)
        form.finish()


def _target(request: Request, path: str, *, with_query: bool) -> str:
    """Return the path at the upstream. A query goes along only where no model is judged."""
    for name, value in request.path_params.items():
        if not _PARAMETER.fullmatch(value):
            raise InvalidRequest(f"'{value[:64]}' is not an id.", param=name)
        path = path.replace(f"{{{name}}}", value)
    query: bytes = request.scope.get("query_string", b"")
    if not query or not with_query:
        return path
    if not _QUERY.fullmatch(query):
        raise InvalidRequest("The query has characters that an address cannot carry.")
    return f"{path}?{query.decode('ascii')}"


class _Answer:
    """Sends what the upstream answers: its status, its type, its bytes, each as soon as it is there."""

    def __init__(self, request: Request, headers: Headers) -> None:
        self._request = request
        self._headers = headers
        self._head = RelayedHead()
        self._started = False

    @property
    def is_event_stream(self) -> bool:
        """Whether an event stream has begun, in which an error can still be said."""
        return self._started and (self._head.content_type or b"").startswith(b"text/event-stream")

    async def take(self, event: RunEvent) -> None:
        """Take one event of the run."""
        if isinstance(event, RelayedHead):
            self._head = event
        elif isinstance(event, RelayedChunk):
            await self.send(event.data, more=True)
        elif isinstance(event, RelayEnded):
            await self.send(b"", more=False)

    async def send(self, data: bytes, *, more: bool) -> None:
        """Send bytes, waiting while the client's buffer is full; raises `ClientGone` for one that reads no more."""
        try:
            async with asyncio.timeout(STALL_S):
                if not self._started:
                    self._started = True
                    headers = [
                        (b"content-type", self._head.content_type or b"application/octet-stream"),
                        *self._head.headers,
                        *self._headers,
                        *spending_headers(self._head.usage),
                    ]
                    start = {"type": "http.response.start", "status": self._head.status, "headers": headers}
                    await self._request.send(start)
                await self._request.send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError as error:
            raise ClientGone from error
