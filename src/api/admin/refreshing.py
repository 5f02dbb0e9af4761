"""The refresh endpoints: a part of the configuration is read again in every worker, and all serve the same after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response

from gateway.errors import ConfigError, InvalidRequest
from gateway.refreshing import Part

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway


async def refresh(gateway: Gateway, part: Part, response: Response) -> None:
    """Refresh, and say on ``response`` what all workers serve now; a wrong file is the caller's to mend (400)."""
    try:
        outcome = await gateway.refresher.refresh(part)
    except ConfigError as error:
        raise InvalidRequest(f"Nothing was changed. {error.message}", code="configuration_error") from error
    response.headers["x-gateway-content-hash"] = outcome.content_hash
    response.headers["x-gateway-workers"] = str(outcome.workers)
