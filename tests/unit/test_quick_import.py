"""The quick import of the SDK: nothing is collected meanwhile, and all as before afterwards."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from sdk_adapter.quick_import import quick_import

_MANY_OBJECTS = """\
import gc
enabled = gc.isenabled()
cycles = []
for _ in range(20_000):
    cycles.append([cycles])
"""


@pytest.fixture
def collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "many_objects.py").write_text(_MANY_OBJECTS, encoding="utf-8")
    (tmp_path / "broken_import.py").write_text("raise ValueError('broken')", encoding="utf-8")
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.unfreeze()
    sys.modules.pop("many_objects", None)


def test_the_collector_rests_during_an_import_and_leaves_out_what_it_made(collections: list[str]) -> None:
    gc.unfreeze()
    collections.clear()
    module: Any = quick_import("many_objects")
    assert collections == []
    assert not module.enabled
    assert gc.isenabled()
    assert gc.get_freeze_count() >= 20_000


def test_the_collector_works_again_after_an_import_that_fails(collections: list[str]) -> None:
    with pytest.raises(ValueError, match="broken"):
        quick_import("broken_import")
    assert gc.isenabled()


def test_a_collector_that_was_at_rest_stays_so(collections: list[str]) -> None:
    gc.disable()
    try:
        quick_import("many_objects")
        assert not gc.isenabled()
    finally:
        gc.enable()
