"""Writes the tables of docs/references that the code already knows: settings, endpoints, errors, metrics.

    PYTHONPATH=src python scripts/reference_docs.py [--check]

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; the prose around it is written by hand. With
`--check` nothing is written, and the exit code says whether a table is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from api.route_table import TABLE
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.observability.metrics import Metrics

REFERENCES = Path(__file__).resolve().parents[1] / "docs" / "references"


def main(argv: Sequence[str] | None = None) -> int:
    """Write every table, or check them; return 1 when a check finds one out of date."""
    parser = argparse.ArgumentParser(description="Write the generated tables of docs/references.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a table is out of date")
    check = parser.parse_args(argv).check
    stale = [path for path in sorted(REFERENCES.glob("*.md")) if _update(path, check=check)]
    for path in stale:
        print(f"{'out of date' if check else 'written'}: docs/references/{path.name}")
    return 1 if check and stale else 0


def settings_table() -> Iterator[str]:
    """Every environment variable, its default and its meaning."""
    yield "| variable | default | meaning |"
    yield "|---|---|---|"
    for item in fields(Settings):
        names = ", ".join(f"`{name}`" for name in (item.metadata["env"], *item.metadata["aliases"]))
        yield f"| {names} | {_default(item.default)} | {item.metadata['doc']} |"


def endpoints_table() -> Iterator[str]:
    """Every row of the route table."""
    yield "| method and path | also at | action | needs | effect |"
    yield "|---|---|---|---|---|"
    for route in TABLE.routes:
        also = ", ".join(f"`{path}`" for path in route.aliases) or "–"
        needs = "no key" if route.scope == "public" else f"scope `{route.scope}`"
        yield f"| `{route.method} {route.path}` | {also} | `{route.action}` | {needs} | {route.summary} |"


def errors_table() -> Iterator[str]:
    """Every class of the error tree, as the caller sees it."""
    yield "| status | code | type | `x-should-retry` | when |"
    yield "|---|---|---|---|---|"
    for kind in _tree(GatewayError):
        retry = {None: "–", True: "`true`", False: "`false`"}[kind.default_should_retry]
        code = f"`{kind.code}`" if kind.code else "null, or what the message is about"
        summary = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        yield f"| {kind.status} | {code} | `{kind.type}` | {retry} | {summary} |"


def metrics_table() -> Iterator[str]:
    """Every metric family of a process."""
    yield "| metric | kind | labels | meaning |"
    yield "|---|---|---|---|"
    for family in Metrics().families:
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in family.labels) or "–"
        yield f"| `{name}` | {family.kind} | {labels} | {family.documentation} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "settings": settings_table,
    "endpoints": endpoints_table,
    "errors": errors_table,
    "metrics": metrics_table,
}


def _update(path: Path, *, check: bool) -> bool:
    """Return whether the file's tables differ from what the code says; write them unless ``check``."""
    text = path.read_text(encoding="utf-8")
    fresh = text
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin in fresh:
            body = "\n".join(table())
            fresh = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{body}\n{end}", fresh, flags=re.DOTALL)  # noqa: B023
    if fresh != text and not check:
        path.write_text(fresh, encoding="utf-8")
    return fresh != text


def _tree(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == GatewayError.__module__:
            yield from _tree(child)


def _default(value: object) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "`1`" if value else "`0`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    sys.exit(main())
