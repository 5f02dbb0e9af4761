"""The process of the pre-flight: ``python -m sdk_adapter.preflight_process FD`` (or ``-``); see `preflight_server`."""

import sys

from sdk_adapter.quick_import import quick_import

if __name__ == "__main__":
    quick_import("sdk_adapter.preflight_server").main(sys.argv[1:])
