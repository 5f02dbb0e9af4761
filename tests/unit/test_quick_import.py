"""The quick import of the SDK: less is done, and nothing is missing afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

from pydantic import BaseModel, TypeAdapter

from sdk_adapter.quick_import import _building_later

_LOOK = """\
import gc, json

collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))

from sdk_adapter.quick_import import quick_import
collections.clear()
quick_import("sdk_adapter.publishing")
during = len(collections)

import agents.run_state, mcp_types
from pydantic import BaseModel, TypeAdapter

def models(base):
    for kind in base.__subclasses__():
        yield kind
        yield from models(kind)

kinds = [kind for kind in models(BaseModel) if kind.__module__.startswith(("mcp_types", "agents.sandbox"))]
places = [vars(agents.run_state), vars(mcp_types._types)]
adapters = [found for place in places for found in place.values() if isinstance(found, TypeAdapter)]

def built():
    return sum(kind.__pydantic_complete__ for kind in kinds) + sum(adapter.pydantic_complete for adapter in adapters)

early = built()
for adapter in adapters:
    adapter.rebuild()
for kind in kinds:
    kind.model_rebuild()
print(json.dumps({
    "collections": during, "collects again": gc.isenabled(), "frozen": gc.get_freeze_count() > 100_000,
    "types": len(kinds) + len(adapters), "early": early, "late": built(),
}))
"""


def test_validators_of_the_sdk_wait_for_their_use_and_can_all_be_built() -> None:
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _LOOK]
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["collections"] == 0
    assert seen["collects again"]
    assert seen["frozen"]
    assert seen["types"] > 300
    assert seen["early"] < seen["types"] / 20, "what is imported is built at once"
    assert seen["late"] == seen["types"]


def test_only_what_the_importing_thread_defines_waits() -> None:
    made: list[tuple[type[BaseModel], TypeAdapter[list[int]]]] = []

    def define() -> None:
        class Thing(BaseModel):
            name: str

        made.append((Thing, TypeAdapter(list[int])))

    with _building_later(BaseModel, TypeAdapter):
        define()
        other = threading.Thread(target=define)
        other.start()
        other.join()
    define()

    assert [kind.__pydantic_complete__ for kind, _ in made] == [False, True, True]
    assert [adapter.pydantic_complete for _, adapter in made] == [False, True, True]
    assert [kind.model_validate({"name": "a"}).model_dump() for kind, _ in made] == [{"name": "a"}] * 3
    assert [adapter.validate_json("[1]") for _, adapter in made] == [[1]] * 3
    assert BaseModel.model_config == {}
