"""Generations: private copies of a drop-in's modules, compiled from source, released when the last run is over."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.entry import Diagnostic
from gateway.registry.loading import LoadFailed
from gateway.registry.policy import ModulePolicy
from sdk_adapter.building import Built, build
from sdk_adapter.modules import DropInFinder, Generation, SourceChanged
from tests.support.loading import dropin_at, write, write_agent

NAMES = ("agent", "root_agent", "main_agent", "app", "build_agent", "create_agent", "get_agent")


@pytest.fixture
def finder() -> Iterator[DropInFinder]:
    with DropInFinder().installed() as installed:
        yield installed
        assert all(name.partition(".")[0] in installed.generations for name in sys.modules if "_dropin_" in name)
        for generation in list(installed.generations.values()):
            generation.release()


class Loads:
    """Loads the folder ``Some`` of a root, again and again."""

    def __init__(self, root: Path, finder: DropInFinder) -> None:
        self.root, self.finder, self.number = root.resolve(), finder, 0

    def __call__(self, folder: str = "Some", *, timeout_s: float = 5.0, deny: tuple[str, ...] = ()) -> Built:
        self.number += 1
        work = build(
            dropin_at(self.root, folder),
            self.number,
            self.finder,
            names=NAMES,
            policy=ModulePolicy(deny=deny),
            timeout_s=timeout_s,
        )
        return asyncio.run(work)

    def fails(self, **options: Any) -> Diagnostic:
        with pytest.raises(LoadFailed) as caught:
            self(**options)
        [problem] = caught.value.diagnostics
        assert str(self.root) not in f"{problem.message} {problem.fix} {problem.cause} {problem.file}"
        assert "_dropin_" not in f"{problem.message} {problem.fix} {problem.cause}"
        return problem


@pytest.fixture
def load(tmp_path: Path, finder: DropInFinder) -> Loads:
    return Loads(tmp_path, finder)


def told(built: Built) -> Any:
    return built.agents[0][1].instructions


def test_siblings_by_every_spelling_of_import(load: Loads) -> None:
    write(load.root, "Some/helper.py", "VALUE = 'h'\n")
    write(load.root, "Some/pack/__init__.py", "from . import inner\nTOP = 'p'\n")
    write(load.root, "Some/pack/inner.py", "from .. import helper\nimport helper as plain\nVALUE = helper is plain\n")
    write(load.root, "Some/plainfolder/leaf.py", "VALUE = 'leaf'\n")
    extra = """
import importlib
import helper, pack.inner, plainfolder.leaf as leaf
import pack.inner as inner_alias
from . import helper as relative
from .pack import inner
from pack import TOP, inner as again
from pack.inner import VALUE
from helper import *
def later():
    import helper as inside
    from pack import inner as inner_inside
    return inside, inner_inside
facts = [
    helper is relative, pack.inner is inner, inner is again, inner is inner_alias, TOP == "p", VALUE == "h",
    leaf.VALUE == "leaf", later() == (helper, inner), importlib.import_module(".helper", __package__) is helper,
    __import__("helper") is helper, __import__("pack.inner") is pack, inner.VALUE is True,
]
assert all(facts), facts
"""
    write_agent(load.root, "Some", extra=extra)
    built = load()
    assert {path.name for path in built.generation.files} == {
        "agent.py", "helper.py", "__init__.py", "inner.py", "leaf.py",
    }  # fmt: skip
    assert not {"helper", "pack", "plainfolder", "leaf"} & set(sys.modules)


def test_two_folders_with_helpers_of_one_name_do_not_meet(load: Loads) -> None:
    for folder in ("One", "Two"):
        write(load.root, f"{folder}/helper.py", f"TEXT = 'I am {folder}'\n")
        write_agent(load.root, folder, extra="from helper import TEXT\n")
        path = load.root / folder / "agent.py"
        path.write_text(path.read_text(encoding="utf-8").replace('"x"', "TEXT"), encoding="utf-8")
    assert told(load("One")) == "I am One"
    assert told(load("Two")) == "I am Two"


@pytest.mark.parametrize("name", ["json", "email", "msgspec"])
def test_neither_the_standard_library_nor_packages_are_shadowed(load: Loads, name: str) -> None:
    write(load.root, f"Some/{name}.py", "raise AssertionError('the sibling was imported')\n")
    write_agent(load.root, "Some", extra=f"import {name}\nassert 'Some' not in {name}.__file__\n")
    [warning] = load().warnings
    assert (warning.code, warning.severity) == ("shadowed_helper", "warning")
    assert f"from . import {name}" in warning.fix
    assert importlib.import_module(name).__name__ == name


def test_a_relative_import_reaches_what_a_plain_one_does_not(load: Loads) -> None:
    write(load.root, "Some/json.py", "VALUE = 'mine'\n")
    write_agent(load.root, "Some", extra="from . import json as mine\nassert mine.VALUE == 'mine'\n")
    load()


def test_a_shared_package_under_the_root_is_copied_and_fresh(load: Loads) -> None:
    write(load.root, "_shared/style.py", "from . import words\nTEXT = words.TEXT\n")
    write(load.root, "_shared/words.py", "TEXT = 'first'\n")
    path = write_agent(load.root, "Some", extra="from _shared.style import TEXT\n")
    path.write_text(path.read_text(encoding="utf-8").replace('"x"', "TEXT"), encoding="utf-8")
    first = load()
    write(load.root, "_shared/words.py", "TEXT = 'other'\n")
    second = load()
    assert (told(first), told(second)) == ("first", "other")
    assert load.root / "_shared/words.py" in second.generation.files


def test_a_helper_on_sys_path_is_copied_and_fresh(
    load: Loads, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path_factory.mktemp("library")
    monkeypatch.syspath_prepend(library)
    write(library, "house_style.py", "import house_words\nTEXT = house_words.TEXT\n")
    write(library, "house_words.py", "TEXT = 'first'\n")
    path = write_agent(load.root, "Some", extra="import house_style\n")
    path.write_text(path.read_text(encoding="utf-8").replace('"x"', "house_style.TEXT"), encoding="utf-8")
    first = load()
    write(library, "house_words.py", "TEXT = 'other'\n")
    assert (told(first), told(load())) == ("first", "other")
    assert "house_style" not in sys.modules


def test_a_path_that_the_author_adds_does_not_grow_with_reloads(load: Loads) -> None:
    before = list(sys.path)
    write_agent(load.root, "Some", extra="import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n")
    try:
        for _ in range(3):
            load()
        assert sys.path.count(str(load.root / "Some")) == 1
    finally:
        sys.path[:] = before


def test_source_is_compiled_never_a_pyc(load: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write_agent(load.root, "Some", "aaa")
    write(load.root, "Some/helper.py", "VALUE = 1\n")
    path.write_text("import helper\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    stamp = path.stat()
    assert told(load()) == "aaa"
    path.write_text(path.read_text(encoding="utf-8").replace("aaa", "bbb"), encoding="utf-8")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert told(load()) == "bbb"
    assert not list(load.root.rglob("*.pyc"))


def test_annotations_data_files_main_guard_loops_and_prints(load: Loads, capsys: pytest.CaptureFixture[str]) -> None:
    write(load.root, "Some/prompt.txt", "from a file")
    extra = """
from __future__ import annotations
import asyncio, sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar, get_type_hints
from pydantic import BaseModel
T = TypeVar("T")
class Node(BaseModel):
    child: Node | None = None
    items: list[Leaf] = []
class Leaf(BaseModel):
    value: int
@dataclass
class Data(Generic[T]):
    node: Node
assert Node.model_validate({"child": {"items": [{"value": 1}]}}).child.items[0].value == 1
assert get_type_hints(Data)["node"] is Node
async def answer():
    return 42
assert asyncio.run(answer()) == 42
text = (Path(__file__).parent / "prompt.txt").read_text()
print("printed at import")
if __name__ == "__main__":
    sys.exit("must not run")
"""
    write(load.root, "Some/agent.py", extra + "from agents import Agent\nagent = Agent(name='A', instructions=text)\n")
    assert told(load()) == "from a file"
    assert "printed at import" in capsys.readouterr().out


def test_tracebacks_show_the_real_file(load: Loads) -> None:
    extra = "def fails():\n    raise LookupError('here')\n"
    path = write_agent(load.root, "Some", extra=extra)
    module = sys.modules[load().generation.entry_name]
    with pytest.raises(LookupError) as caught:
        module.fails()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno, last.line) == (str(path), 2, "raise LookupError('here')")


def test_generations_do_not_share_and_the_old_one_dies(load: Loads) -> None:
    extra = "import logging\nlog = logging.getLogger(__name__)\ncounter = []\nclass Mark: pass\nmark = Mark()\n"
    write_agent(load.root, "Some", extra=extra)
    first, second = load(), load()
    old = sys.modules[first.generation.entry_name]
    new = sys.modules[second.generation.entry_name]
    old.counter.append(1)
    assert new.counter == []
    dead = weakref.ref(old.mark)
    agent = weakref.ref(first.agents[0][1])
    package = first.generation.package
    del old
    first.generation.release()
    assert not [name for name in sys.modules if name.startswith(package)]
    del first
    gc.collect()
    assert dead() is None and agent() is None
    assert new.mark is not None


def test_code_that_runs_after_an_edit_may_still_import_lazily(load: Loads) -> None:
    write(load.root, "Some/late.py", "VALUE = 'late'\n")
    write_agent(load.root, "Some", extra="def later():\n    from .late import VALUE\n    return VALUE\n")
    first = load()
    load()
    assert sys.modules[first.generation.entry_name].later() == "late"


def test_an_init_py_in_the_folder_is_its_package(load: Loads) -> None:
    write(load.root, "Some/__init__.py", "WHO = 'package'\n")
    write_agent(load.root, "Some", extra="from . import WHO\nassert WHO == 'package'\n")
    load()


def test_a_single_file_has_the_root_as_its_folder(tmp_path: Path, finder: DropInFinder) -> None:
    root = tmp_path.resolve()
    write(root, "_words.py", "TEXT = 'from the root'\n")
    write(
        root, "solo.py", "import _words\nfrom agents import Agent\nagent = Agent(name='S', instructions=_words.TEXT)\n"
    )
    from_root = dropin_at(root)
    dropin = type(from_root)("default", "solo", root, root, root / "solo.py", "solo.py")
    work = build(dropin, 1, finder, names=NAMES, policy=ModulePolicy(), timeout_s=5)
    assert told(asyncio.run(work)) == "from the root"


def test_a_file_saved_after_the_pre_flight_is_not_run(tmp_path: Path, finder: DropInFinder) -> None:
    path = write_agent(tmp_path.resolve(), "Some")
    expected = {path: "0" * 64}
    generation = Generation(dropin_at(tmp_path.resolve()), 1, finder, ModulePolicy(), expected)
    with pytest.raises(SourceChanged):
        generation.import_entry()


def test_denied_imports_are_refused_before_anything_runs(load: Loads) -> None:
    marker = load.root / "marker"
    ran = f"open({str(marker)!r}, 'w').close()\n"
    write(load.root, "Some/pack/deep.py", "import ctypes\n")
    write(load.root, "Some/helper.py", "def f():\n    from pack import deep\n")
    write_agent(load.root, "Some", extra=ran + "from . import helper\n")
    problem = load.fails(deny=("ctypes",))
    assert (problem.kind, problem.code, problem.file, problem.line) == ("security", "blocked", "Some/pack/deep.py", 1)
    assert "rule 'ctypes'" in problem.message
    assert not marker.exists()


def test_a_denied_import_that_hides_is_refused_when_its_file_is_reached(load: Loads) -> None:
    write(load.root, "Some/pack/deep.py", "import ctypes\n")
    write_agent(
        load.root, "Some", extra="import importlib\nimportlib.import_module('.pack.' + chr(100) + 'eep', __package__)\n"
    )
    problem = load.fails(deny=("ctypes",))
    assert (problem.code, problem.file) == ("blocked", "Some/pack/deep.py")


def test_a_denied_drop_in_is_refused_by_its_name(load: Loads) -> None:
    write_agent(load.root, "Some")
    assert load.fails(deny=("Some",)).code == "blocked"
    assert load.fails(deny=("default/some",)).code == "blocked"


@pytest.mark.parametrize(
    ("source", "code", "kind", "line", "words"),
    [
        ("x = (1,\ny = 2\n", "syntax_error", "import", 1, ("never closed",)),
        ("import no_such_thing_here\n", "missing_package", "dependency", 1, ("pip install no-such-thing-here",)),
        ("import yamll, sklearn\n", "missing_package", "dependency", 1, ("yamll",)),
        ("from .helpers import x\n", "missing_module", "import", 1, ("helpers", "Did you mean 'helper'?")),
        ("import json.nothing\n", "missing_module", "dependency", 1, ("json.nothing",)),
        ("from helper import missing\n", "import_error", "import", 1, ("cannot import name 'missing'",)),
        (
            "import os\n\nos.environ['MY_TOKEN']\n",
            "import_error",
            "import",
            3,
            ("Set the environment variable MY_TOKEN",),
        ),
        ("open('absent.txt')\n", "import_error", "import", 1, ("Path(__file__).parent",)),
        ("import sys\nsys.exit(3)\n", "import_exit", "import", 2, ("sys.exit(3)", "__main__")),
        ("raise KeyboardInterrupt\n", "import_exit", "import", 1, ("KeyboardInterrupt",)),
        ("class Odd(BaseException): pass\nraise Odd('x')\n", "import_error", "import", 2, ("Odd: x",)),
        ("x = 1\x00\n", "undecodable", "import", None, ("UTF-8",)),
    ],
)
def test_what_goes_wrong_at_import_teaches(
    load: Loads, source: str, code: str, kind: str, line: int | None, words: tuple[str, ...]
) -> None:
    write(load.root, "Some/helper.py", "")
    write(load.root, "Some/agent.py", source)
    problem = load.fails()
    assert (problem.code, problem.kind, problem.file, problem.line) == (code, kind, "Some/agent.py", line)
    assert problem.fix and problem.occurred_at > 0
    for word in words:
        assert word in f"{problem.message} {problem.fix}"


def test_an_error_in_a_helper_names_the_helper(load: Loads) -> None:
    write(load.root, "Some/helper.py", "\n\n1 / 0\n")
    write_agent(load.root, "Some", extra="import helper\n")
    problem = load.fails()
    assert (problem.file, problem.line, problem.cause) == ("Some/helper.py", 3, "1 / 0")


def test_bytes_that_are_not_text(load: Loads) -> None:
    (load.root / "Some").mkdir()
    (load.root / "Some/agent.py").write_bytes(b"agent = '\xff\xfe'\n")
    assert load.fails().code == "undecodable"


def test_a_file_that_is_too_large(load: Loads) -> None:
    write_agent(load.root, "Some", extra="# padding\n" * 100_000)
    problem = load.fails()
    assert problem.code == "file_too_large" and "512" in problem.message


def test_a_sibling_that_leads_out_of_the_root(load: Loads, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = write(tmp_path_factory.mktemp("outside"), "helper.py", "VALUE = 1\n")
    write_agent(load.root, "Some", extra="import helper\n")
    (load.root / "Some/helper.py").symlink_to(outside)
    problem = load.fails()
    assert (problem.code, problem.kind, problem.file) == ("path_escapes_root", "security", "Some/helper.py")


def test_an_import_that_takes_too_long_names_the_line_it_stands_at(load: Loads) -> None:
    # The thread cannot be stopped; it ends by itself once nobody looks any more.
    write(load.root, "Some/agent.py", "import time\n\nfor _ in range(15):\n    time.sleep(0.1)\n")
    problem = load.fails(timeout_s=0.3)
    assert (problem.code, problem.line) == ("import_timeout", 4)
    assert "0.3 s" in problem.message
