"""What is known of an upstream's health: written by whoever just asked it, read by routing and admins."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(slots=True)
class UpstreamStatus:
    """The last word about one upstream; it lives as long as the `Upstream` it belongs to.

    ``healthy`` is None until somebody has asked. ``last_checked`` is epoch seconds. ``last_error`` is the sentence of
    the last failure, None while the upstream is healthy; it holds no key and no header.
    """

    healthy: bool | None = None
    last_checked: float | None = None
    last_error: str | None = None

    def succeeded(self) -> None:
        """Note a good answer."""
        self.healthy, self.last_checked, self.last_error = True, time.time(), None

    def failed(self, reason: str) -> None:
        """Note why it did not answer well."""
        self.healthy, self.last_checked, self.last_error = False, time.time(), reason
