"""`gateway version`: which versions run here."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from gateway import __version__


def run(arguments: argparse.Namespace) -> int:
    """Print the versions of the gateway, Python and the two OpenAI packages."""
    print(f"agent-gateway {__version__}")
    print(f"python {platform.python_version()}")
    for package in ("openai-agents", "openai"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    return 0
