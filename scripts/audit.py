"""The nightly audit: `gateway audit`, run from a checkout.

    PYTHONPATH=src python scripts/audit.py [--lock requirements.txt] [--path AGENTS] [--no-packages]

Prints JSON, and exits with 1 when there is a finding or a package that could not be asked about.
"""

from __future__ import annotations

import sys

from gateway_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
