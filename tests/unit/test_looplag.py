"""What `loop.blocked` names: an author's code where there is any, else what the gateway itself is busy with."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.server import ROOT

SCRIPT = """
import asyncio, json, sys, time
from gateway.observability.logs import configure_logging
from gateway.observability.looplag import watch_loop
from gateway.observability.metrics import Metrics

module, source, file = json.loads(sys.argv[1])

async def hold_up():
    with watch_loop(Metrics()):
        await asyncio.sleep(0)
        exec(compile(source, file, "exec"), {"__name__": module, "sleep": time.sleep})

configure_logging()
asyncio.run(hold_up())
"""
"""In a process of its own: around what holds up the loop stands what starts Python, as under a gateway."""

FUNCTION = "def read_all():\n    sleep(1.2)\n\nread_all()\n"
WHOLE = "sleep(1.2)\n"


def blame(module: str, source: str, file: str) -> dict[str, Any]:
    """Run code of a module, which holds up the loop, and return the line about it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([module, source, file])],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        check=True,
        timeout=120,
    )
    (line,) = done.stderr.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(
    ("module", "source", "file", "function", "message"),
    [
        ("gateway.fake", FUNCTION, "/srv/fake.py", "read_all", "while the gateway itself is busy with read_all()"),
        (
            "gateway.fake",
            WHOLE,
            "/srv/fake.py",
            "<module>",
            "the gateway itself is busy with the import of /srv/fake.py",
        ),
        ("acme.words", FUNCTION, "/srv/words.py", "read_all", "while read_all() blocks the event loop: a plain 'def'"),
        ("acme.words", WHOLE, "/srv/words.py", "<module>", "while the import of /srv/words.py blocks the event loop:"),
    ],
)
def test_who_holds_up_the_loop_is_named(module: str, source: str, file: str, function: str, message: str) -> None:
    found = blame(module, source, file)
    assert (found["event"], found["function"], found["module_path"]) == ("loop.blocked", function, file)
    assert message in found["message"]


def test_what_starts_python_is_nobodys_code() -> None:
    found = blame("runpy", FUNCTION.replace("read_all", "_run_code"), "<frozen runpy>")
    assert "the gateway itself" in found["message"]
