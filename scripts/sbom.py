"""Writes the bill of materials (CycloneDX JSON) of one Python environment, with the hashes of the lock, and checks it.

    python scripts/sbom.py ENVIRONMENT_PYTHON [-o sbom.json] [--lock requirements.txt]

Licences and dependencies come from what is installed, hashes from the lock: those of every file that
`pip install --require-hashes` would accept. It fails when a locked package would stand there without its hashes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator

ROOT = Path(__file__).resolve().parents[1]
_PIN = re.compile(
    r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)[^\n]*((?:\n    --hash=sha256:[0-9a-f]{64}[^\n]*)*)", re.MULTILINE
)
_BOOTSTRAP = frozenset({"pip", "setuptools", "wheel"})


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file; return 1, with the reason, when it would not be valid or not complete."""
    parser = argparse.ArgumentParser(description="Write a CycloneDX bill of materials with hashes.")
    parser.add_argument("python", type=Path, help="interpreter of the environment")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "sbom.json")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.txt")
    arguments = parser.parse_args(argv)
    document = of_environment(arguments.python)
    missing = add_hashes(document, hashes_of(arguments.lock.read_text(encoding="utf-8")))
    if missing:
        print(f"sbom: {arguments.lock.name} has no hashes of {', '.join(missing)}", file=sys.stderr)
        return 1
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    error = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        print(f"sbom: not valid: {error}", file=sys.stderr)
        return 1
    arguments.output.write_text(text, encoding="utf-8")
    print(f"{arguments.output.name}: {len(document['components'])} components")
    return 0


def of_environment(python: Path) -> dict[str, Any]:
    """Return the bill of materials of what ``python`` has installed."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--of", "JSON"]
    done = subprocess.run(
        [*command, "--sv", "1.6", "--pyproject", str(ROOT / "pyproject.toml"), "-o", "-", str(python)],
        stdout=subprocess.PIPE,
        check=True,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def hashes_of(lock: str) -> dict[tuple[str, str], list[str]]:
    """Return the SHA-256 digests of each pinned release, by name and version."""
    return {
        (_normal(name), version): re.findall(r"--hash=sha256:([0-9a-f]{64})", hashes)
        for name, version, hashes in _PIN.findall(lock)
    }


def add_hashes(document: dict[str, Any], hashes: dict[tuple[str, str], list[str]]) -> list[str]:
    """Add each component's digests as those of its distribution; return the names that have none."""
    missing = []
    for component in document["components"]:
        name, version = _normal(component["name"]), component.get("version", "")
        found = hashes.get((name, version))
        if found:
            component.setdefault("externalReferences", []).append(
                {
                    "type": "distribution",
                    "url": f"https://pypi.org/project/{name}/{version}/",
                    "hashes": [{"alg": "SHA-256", "content": content} for content in found],
                }
            )
        elif name not in _BOOTSTRAP:
            missing.append(f"{name} {version}")
    return missing


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
