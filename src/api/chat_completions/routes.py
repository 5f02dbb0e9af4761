"""POST /v1/chat/completions: bytes in, one completion or a stream of chunks out."""

from __future__ import annotations

import logging

from api.chat_completions.encoder import (
    DONE,
    ChunkEncoder,
    CompletionBuilder,
    answer_response,
    encode_error,
    limit_headers,
)
from api.dependencies import find_body, read_body, session_id
from api.errors import public, routed_headers
from api.routing import Request, Response
from api.sse import ClientGone, Connection, EventStream
from gateway.admission import Call, admit
from gateway.chat import CHAT_PATH, ChatRequest, RelayRequest, decode_body
from gateway.errors import GatewayError, ModelNotFound
from gateway.events import RelayedHead, Routed, RunEvent
from gateway.observability.logs import log_event
from gateway.reserving import reserve
from gateway.run import DirectExecutor, Executor, Run

_log = logging.getLogger("api.chat_completions")


async def create_chat_completion(request: Request) -> Response | None:
    """Answer a conversation."""
    return await serve_model_call(request, CHAT_PATH)


async def serve_model_call(request: Request, path: str) -> Response | None:
    """Admit the request, run it, and answer; nothing is sent before the first event of a stream.

    ``path`` is the surface, without ``/v1``; only chat has agents.
    """
    body = find_body(request)
    if body is None:
        body = await read_body(request)
    gateway, headers = request.gateway, request.headers
    settings = gateway.settings
    call = Call(
        request.caller,
        request.request_id,
        body,
        decode_body(body),
        headers,
        session_id(headers),
        path,
        headers.get("x-gateway-upstream"),
        headers.get("cache-control"),
        headers.get(settings.end_user_header) if settings.end_user_header else None,
        request.ids.uuid(),
    )
    try:
        run, executor = admit(call, gateway.holder.current, settings)
    except ModelNotFound:
        if gateway.loaded.is_set():
            raise
        run, executor = await _admit_when_loaded(request, call)
    if run.principal.allowance is not None:
        run = await reserve(run, len(body), gateway.limiter, gateway.holder.current, settings)
    try:
        with Connection(request.receive, request.client.exchange) as connection:
            if run.streamed:
                await _stream(request, run, executor, connection)
                return None
            if isinstance(executor, DirectExecutor):
                return answer_response(await gateway.engine.answer(run, executor), limit_headers(run))
            builder = CompletionBuilder(run)
            await gateway.engine.execute(run, executor, builder.add)
            return Response(builder.body(), headers=builder.headers + limit_headers(run))
    except ClientGone:
        log_event(_log, "http.client.gone", run_id=run.id.hex, model=run.model)
        return None


async def _admit_when_loaded(request: Request, call: Call) -> tuple[Run, Executor]:
    """Admit a name that may only be early: the first load of the agents is under way."""
    gateway = request.gateway
    while True:
        await gateway.wait_for_agents()
        try:
            return admit(call, gateway.holder.current, gateway.settings)
        except ModelNotFound:
            if gateway.loaded.is_set():
                raise


async def _stream(request: Request, run: Run, executor: Executor, connection: Connection) -> None:
    encoder = ChunkEncoder(run, include_usage=_wants_usage(run.request))
    stream = EventStream(request.client, connection, request.gateway.settings.ping_s)
    stream.headers = limit_headers(run)

    async def emit(event: RunEvent) -> None:
        if not stream.started:
            if isinstance(event, RelayedHead):
                stream.headers += event.headers
            elif isinstance(event, Routed):
                stream.headers += routed_headers(event.upstream, event.attempts, event.hedged)
        data = encoder.encode(event)
        if data:
            await stream.write(data)

    try:
        if isinstance(executor, DirectExecutor) and request.client.exchange is not None:
            await request.gateway.engine.pipe(run, executor, stream)
            await stream.write(DONE, more=False)
        else:
            await request.gateway.engine.execute(run, executor, emit)
            await stream.write(b"", more=False)
    except Exception as error:
        if not stream.started:
            raise
        if not isinstance(error, GatewayError):
            log_event(_log, "http.request.crashed", level=logging.ERROR, exc_info=error)
        shown = public(error)
        request.gateway.metrics.error(shown.domain, shown.code or shown.type)
        await stream.write(encode_error(shown), more=False)
    finally:
        stream.close()


def _wants_usage(request: ChatRequest | RelayRequest) -> bool:
    if isinstance(request, RelayRequest):
        return request.include_usage
    return bool(request.stream_options and request.stream_options.include_usage)
