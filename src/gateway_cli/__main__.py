"""`python -m gateway_cli` is the `gateway` command."""

import sys

from gateway_cli.main import main

sys.exit(main())
