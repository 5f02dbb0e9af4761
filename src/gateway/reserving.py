"""Reserving: what an admitted run may use is taken of its caller's limits before anything is called.

The last step of admission, after names, rights and policy: speed limits first, then budgets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Raw

from gateway.chat import COMPLETIONS_PATH, EMBEDDINGS_PATH, RelayRequest, decode_value
from gateway.config import Settings
from gateway.limits.limiter import Limiter
from gateway.limits.reservation import NOTHING, Estimate
from gateway.limits.rules import nanodollars_of_pico
from gateway.routing.routed import RoutedUpstream
from gateway.routing.targets import Target
from gateway.run import Run
from gateway.snapshot import Snapshot
from gateway.upstreams.relaying import ByteTarget
from gateway.usage.estimate import CHARACTERS_PER_TOKEN
from gateway.usage.measures import Asked
from gateway.usage.meter import Meter

MOST_INPUT_TOKENS = 200_000
"""A body larger than this many tokens would be is full of images or audio, whose tokens are far fewer."""


async def reserve(run: Run, request_bytes: int, limiter: Limiter, snapshot: Snapshot, settings: Settings) -> Run:
    """Return the run with its reservation. Only for callers that have an allowance.

    An agent reserves for each of its model calls by itself; here it is only asked whether anything is left.

    Raises `RateLimited`, `BudgetExhausted`, or `ServiceUnavailable` for a budget that nobody can look at.
    """
    request = run.request
    estimate = NOTHING
    if run.binding is not None and isinstance(request, RelayRequest) and limiter.weighs(run.principal, run.end_user):
        written, is_promised = _output_tokens(request, settings.reserved_output_tokens)
        served = candidates(run.binding.upstream, run.binding.model)
        estimate = worst_case(snapshot.meter, served, request_bytes, written, is_promised=is_promised)
    reservation = await limiter.admit(run.principal, end_user=run.end_user, estimate=estimate)
    return msgspec.structs.replace(run, reservation=reservation)


async def reserve_relay(
    run: Run, upstream: ByteTarget, name: str | None, asked: Asked, limiter: Limiter, snapshot: Snapshot
) -> Run:
    """Return a run that is relayed as bytes with its reservation, as `reserve` does; ``name`` is the upstream's model.

    What its upstream will count in tokens is not known before; its cost by pictures, characters or minutes is.
    """
    estimate = NOTHING
    if name is not None and limiter.weighs(run.principal, run.end_user):
        most, meter = asked.most(), snapshot.meter
        costs = [meter.most_measured(by, model, most) for by, model in candidates(upstream, name)]
        estimate = Estimate(0, nanodollars_of_pico(max(costs, default=0)), asked.is_promised)
    reservation = await limiter.admit(run.principal, end_user=run.end_user, estimate=estimate)
    return msgspec.structs.replace(run, reservation=reservation)


def worst_case(
    meter: Meter, served_by: Iterable[tuple[str, str]], request_bytes: int, output_tokens: int, *, is_promised: bool
) -> Estimate:
    """Return the most that one model call may use, whichever of the upstreams and models answers it."""
    read = min(-(-request_bytes // CHARACTERS_PER_TOKEN), MOST_INPUT_TOKENS)
    cost = max((meter.most(upstream, model, read, output_tokens) for upstream, model in served_by), default=0)
    return Estimate(read + output_tokens, nanodollars_of_pico(cost), is_promised)


def candidates(target: Target | ByteTarget, model: str) -> list[tuple[str, str]]:
    """Return every upstream and model that may answer a call of ``model`` at ``target``."""
    if not isinstance(target, RoutedUpstream):
        return [(target.name, model)]
    route = target.route
    every = [*route.candidates, *(one for some in (route.fallbacks or {}).values() for one in some)]
    return [(one.target.name, one.model) for one in every]


def _output_tokens(request: RelayRequest, default: int) -> tuple[int, bool]:
    """Return how many tokens an answer may have in all, and whether the request says so itself."""
    if request.path == EMBEDDINGS_PATH:
        return 0, True
    fields = request.fields
    said = [_whole(fields, name) for name in ("max_completion_tokens", "max_tokens")]
    promised = max((tokens for tokens in said if tokens is not None), default=None)  # servers differ in whom they obey
    answers = max(_whole(fields, "n") or 1, _whole(fields, "best_of") or 1)
    if request.path == COMPLETIONS_PATH:
        prompt = _decoded(fields, "prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            answers *= len(prompt)
    return (promised or default) * answers, promised is not None


def _whole(fields: Mapping[str, Raw], name: str) -> int | None:
    value = _decoded(fields, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1:
        return None
    return min(int(value), 10**9)


def _decoded(fields: Mapping[str, Raw], name: str) -> Any:
    raw = fields.get(name)
    return None if raw is None else decode_value(raw, name)
