"""What has to be the same in every worker, or is asked of all of them: overrides, recent errors, endpoint times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.errors import GatewayError, NotFound, WorkersDisagree
from gateway.observability.recent import CAPACITY, ErrorRecord
from gateway.registry.entry import Diagnostic
from gateway.security.acl import Override
from gateway.tools.manager import Violation
from gateway.workers.peer import CallFailed
from gateway.workers.workers import WorkerReply, shared_failure

if TYPE_CHECKING:  # the composition root imports this module
    from api.bootstrap import Gateway


class Failures(msgspec.Struct):
    """The recent errors of one worker."""

    drop_ins: list[Diagnostic]
    runs: list[ErrorRecord]


def share(gateway: Gateway) -> None:
    """Answer in this worker what the others ask."""

    async def apply(value: Any) -> None:
        gateway.overrides.apply(msgspec.convert(value, Override))

    async def revoke(override_id: Any) -> None:
        with suppress(NotFound):  # it expired here a moment earlier
            gateway.overrides.revoke(override_id)

    async def overrides(_: Any) -> Any:
        return msgspec.to_builtins(list(gateway.overrides.list_overrides()))

    async def failures(_: Any) -> Any:
        drop_ins, runs = gateway.catalogue.recent_errors(), gateway.engine.recent_errors.list_errors()
        blocked = map(_blocked, gateway.tools.violations)
        return msgspec.to_builtins(Failures([*drop_ins, *blocked], [_plain(record) for record in runs]))

    async def endpoints(_: Any) -> Any:
        return gateway.endpoints.export()

    for name, handler in {
        "endpoints": endpoints,
        "override.apply": apply,
        "override.revoke": revoke,
        "override.list": overrides,
        "failures": failures,
    }.items():
        gateway.workers.handle(name, handler)


async def catch_up(gateway: Gateway) -> None:
    """Take over what the other workers were told before this one began, and read again what changed since it did."""
    if gateway.workers.is_alone:
        return
    await gateway.refresher.reload_files(await gateway.keeper.changed())
    with suppress(CallFailed):
        for reply in await gateway.workers.everywhere("override.list"):
            for override in msgspec.convert(reply.value or [], list[Override]):
                with suppress(GatewayError):
                    gateway.overrides.apply(override)


async def apply_override(gateway: Gateway, override: Override) -> None:
    """Put an override in force in every worker; raises what all of them say, or `WorkersDisagree`."""
    if gateway.workers.is_alone:
        gateway.overrides.apply(override)
        return
    await _all(gateway, "override.apply", msgspec.to_builtins(override))


async def revoke_override(gateway: Gateway, override_id: str) -> Override:
    """End an override in every worker; raises `NotFound` when it is in force in none."""
    found = next((known for known in gateway.overrides.list_overrides() if known.id == override_id), None)
    if found is None or gateway.workers.is_alone:
        return gateway.overrides.revoke(override_id)
    await _all(gateway, "override.revoke", override_id)
    return found


def _blocked(item: Violation) -> Diagnostic:
    return Diagnostic(
        kind="security",
        code="tool_not_allowed",
        message=f"The tool '{item.tool}' is not offered: {item.message}",
        fix="Allow its module under default.local_tools_allowlist in security.yaml, or take the entry away.",
        file="tools.yaml",
        module=item.module,
        occurred_at=item.occurred_at,
    )


async def recent_failures(gateway: Gateway) -> tuple[Sequence[Diagnostic], Sequence[ErrorRecord]]:
    """Return the failed drop-ins, each once, and the failed runs of every worker; newest first."""
    replies = await ask(gateway, "failures")
    found = [msgspec.convert(reply.value, Failures) for reply in replies if reply.error is None]
    drop_ins: dict[Any, Diagnostic] = {}
    for item in sorted((item for part in found for item in part.drop_ins), key=lambda item: -item.occurred_at):
        drop_ins.setdefault(dataclasses.replace(item, occurred_at=0.0), item)
    runs = sorted((record for part in found for record in part.runs), key=lambda record: -record.occurred_at)
    return list(drop_ins.values())[:CAPACITY], runs[:CAPACITY]


async def endpoint_times(gateway: Gateway) -> Sequence[Any]:
    """Return what every worker has recorded of its routes."""
    return [reply.value for reply in await ask(gateway, "endpoints") if reply.error is None]


async def ask(gateway: Gateway, name: str) -> Sequence[WorkerReply]:
    """Ask all; where the supervisor is gone this worker speaks for itself."""
    try:
        return await gateway.workers.everywhere(name, timeout_s=5)
    except CallFailed:
        return await gateway.workers.here(name)


async def _all(gateway: Gateway, name: str, value: Any) -> None:
    try:
        replies = await gateway.workers.everywhere(name, value, timeout_s=10)
    except CallFailed as error:
        raise WorkersDisagree(f"The other workers cannot be told: {error}.", retry_after_s=1) from error
    failed = shared_failure(replies)
    if failed is not None:
        raise failed
    wrong = [f"worker {reply.slot} (pid {reply.pid}): {reply.error}" for reply in replies if reply.error is not None]
    if wrong:
        raise WorkersDisagree(f"Not every worker did it. {'; '.join(wrong)}", retry_after_s=1)


def _plain(record: ErrorRecord) -> ErrorRecord:
    return dataclasses.replace(record, details=dict(record.details))
