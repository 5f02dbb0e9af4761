"""Imports what needs the SDK while the collector rests: it would walk over all that has been imported, again and again.

That is an eighth of `import agents`, and another 80 ms of the event loop for a look at the end that finds next to
nothing. What an import has made lives as long as the process: later collections leave it out.
"""

from __future__ import annotations

import gc
import importlib
from types import ModuleType


def quick_import(name: str) -> ModuleType:
    """Import a module and all it needs in this thread; what lives then is left out of later collections."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(name)
        gc.freeze()
    finally:
        if was_collecting:
            gc.enable()
    return module
