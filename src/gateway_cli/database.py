"""The gateway's database as a command uses it: opened, used, and its failure said in one sentence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from gateway.config import Settings
from gateway.errors import StoreUnavailable
from gateway.store.store import Store, database_url, why_unavailable
from gateway_cli.errors import CliError
from gateway_cli.settings import database_words

T = TypeVar("T")


def with_database(settings: Settings, modules: Sequence[str], work: Callable[[Store], Awaitable[T]]) -> T:
    """Return what ``work`` makes of the database, which it opens itself; raise `CliError` where it cannot be had.

    What the gateway logs of it meanwhile is left out: a command says it in its own words.
    """

    async def run() -> T:
        async with Store(database_url(settings), modules) as store:
            return await work(store)

    logging.disable(logging.ERROR)
    try:
        return asyncio.run(run())
    except StoreUnavailable as error:
        reason = why_unavailable(error)
        words = f"The database does not answer ({reason})" if reason else error.message.removesuffix(".")
        raise CliError(f"{words}: {database_words(settings)}.") from error
    finally:
        logging.disable(logging.NOTSET)
