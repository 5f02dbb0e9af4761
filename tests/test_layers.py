"""Imports point downward: which room may import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

FORBIDDEN = {
    "gateway": {"agents", "api", "fastapi", "gateway_cli", "openai", "sdk_adapter", "starlette", "uvicorn"},
    "api": {"agents", "gateway_cli", "sdk_adapter"},
    "sdk_adapter": {"api", "fastapi", "gateway_cli", "starlette"},
    "gateway_cli": {"agents", "fastapi", "starlette"},
}
"""What each room never imports (docs/decisions/0001)."""

EXCEPTIONS = {("api/bootstrap.py", "sdk_adapter")}
"""The composition root is the one door from HTTP to the SDK's adapter."""

LAYERS = (
    (
        "caller_context",
        "chat",
        "chunks",
        "config",
        "deadlines",
        "errors",
        "events",
        "ids",
        "model_settings",
        "principal",
    ),
    ("observability", "plugins"),
    ("store", "workers"),
    ("caching", "limits", "memory", "policy", "registry", "routing", "security", "tools", "upstreams", "usage"),
    ("run", "snapshot"),
    ("admission", "refreshing", "reloading"),
    ("reserving",),
    ("runs", "tasks", "teams"),
)
"""The order inside `gateway`, lowest first."""

UPWARD = {("admission.py", "runs.relay"), ("admission.py", "runs.cached")}
"""Admission names the executors of a raw upstream model, which are plain values until they run."""


def source_files(room: str) -> list[Path]:
    return sorted((SRC / room).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports at run time, with its line; names imported from a package count as its modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            yield node.lineno, node.module


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(SRC)}:{line} imports {module}"
        for path in source_files(room)
        for line, module in imports(path)
        if (top := module.partition(".")[0]) in FORBIDDEN[room]
        and (path.relative_to(SRC).as_posix(), top) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_inside_gateway_imports_point_downward_and_peers_do_not_know_each_other() -> None:
    rank = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for path in source_files("gateway"):
        relative = path.relative_to(SRC / "gateway")
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in rank, f"gateway/{own} has no place in LAYERS"
        for line, module in imports(path):
            top, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if top != "gateway" or not other or other == own or (relative.as_posix(), rest) in UPWARD:
                continue
            # Values are one layer of plain modules that may use each other; packages of one layer may not.
            allowed = rank[other] < rank[own] or (rank[other] == rank[own] and rank[own] in (0, rank["run"]))
            if not allowed:
                wrong.append(f"gateway/{relative.as_posix()}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_there_are_files_to_judge() -> None:
    assert all(source_files(room) for room in FORBIDDEN)


def test_the_drop_in_folder_is_not_a_package() -> None:
    """An `__init__.py` there would hide the SDK, whose import name is `agents`."""
    assert not list((SRC / "agents").rglob("__init__.py"))


def test_src_holds_no_other_top_level_name() -> None:
    """A further generic name (`tools`, `memory` …) would shadow a drop-in author's own module."""
    names = {path.name for path in SRC.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert names == {"agents", "api", "config", "gateway", "gateway_cli", "sdk_adapter"}
