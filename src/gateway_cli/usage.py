"""`gateway usage`: what was used and what it cost, from the gateway's database, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from gateway.store.store import Store
from gateway.usage.question import GROUP_NAMES, Question, Totals
from gateway_cli.database import with_database
from gateway_cli.errors import CliError
from gateway_cli.settings import read_store_settings
from gateway_cli.terminal import printable

_MODULES = ("gateway.usage.rows",)
_MOST_ROWS = 10_000
_DAYS = 30
_NUMBERS = (
    ("REQUESTS", "requests"),
    ("FAILED", "failures"),
    ("CALLS", "model_calls"),
    ("INPUT", "input_tokens"),
    ("CACHED", "cached_input_tokens"),
    ("OUTPUT", "output_tokens"),
    ("COST USD", "cost_usd"),
)


def run(arguments: argparse.Namespace) -> int:
    """Print the sums; what a running gateway has not written yet, a second's worth, is not in them."""
    settings = read_store_settings(arguments.path)
    question = _question(arguments)

    async def work(store: Store) -> Totals:
        if store.path is not None and not store.path.exists():
            return Totals([], has_more=False)
        await store.open()
        from gateway.usage import rows  # noqa: PLC0415 - SQLAlchemy, when there is a database

        async with store.reading() as connection:
            return await connection.run(rows.ask, question)

    totals = with_database(settings, _MODULES, work)
    records = [total.record() for total in totals.groups]
    if arguments.json:
        print(json.dumps({"group_by": question.group_by, "data": records, "has_more": totals.has_more}, indent=2))
    elif not any(record["requests"] or record["model_calls"] for record in records):
        print("Nothing was used in that time; `--from YYYY-MM-DD` looks further back.")
    else:
        _print_table(question.group_by, records)
        if totals.has_more:
            print(f"These are the first {_MOST_ROWS}; narrow them with --from, --to or --only.")
    return 0


def _question(arguments: argparse.Namespace) -> Question:
    names = tuple(name.strip() for name in arguments.by.split(",") if name.strip())
    if len(set(names)) < len(names) or not set(names) <= set(GROUP_NAMES):
        raise CliError(f"--by takes {', '.join(GROUP_NAMES)}, each once, separated by commas.", status=2)
    only = {}
    for text in arguments.only or ():
        name, _, value = text.partition("=")
        if name not in GROUP_NAMES or name == "day" or not value:
            known = ", ".join(name for name in GROUP_NAMES if name != "day")
            raise CliError(f"--only takes NAME=VALUE, where NAME is one of {known}.", status=2)
        only[name] = value
    today = datetime.now(UTC).date()
    first = _day(arguments.start, "--from") or today - timedelta(days=_DAYS - 1)
    last = _day(arguments.end, "--to") or today
    if last < first:
        raise CliError("--to lies before --from.", status=2)
    return Question(
        from_ms=_first_ms(first),
        to_ms=_first_ms(last + timedelta(days=1)),
        group_by=names,
        only=only,
        limit=_MOST_ROWS,
    )


def _print_table(group_by: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    rows = [[*(name.upper() for name in group_by), *(title for title, _ in _NUMBERS)]]
    is_partial = False
    for record in records:
        numbers = [f"{record[key]:,}" if isinstance(record[key], int) else record[key] for _, key in _NUMBERS]
        if record["calls_without_cost"]:
            is_partial = True
            numbers[-1] += "*"
        rows.append([*("-" if record[name] is None else printable(str(record[name])) for name in group_by), *numbers])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.ljust(width) if column < len(group_by) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    if is_partial:
        print("* without the calls whose cost is not known; prices.yaml may name it.")


def _day(text: str | None, option: str) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise CliError(f"{option}: {text!r} is not a date; write YYYY-MM-DD.", status=2) from error


def _first_ms(day: date) -> int:
    return int(datetime.combine(day, time.min, UTC).timestamp() * 1000)
