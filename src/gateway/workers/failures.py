"""A `GatewayError` on its way from one process to another: the same class, status, code and words on the other side."""

from __future__ import annotations

import msgspec

from gateway import errors
from gateway.errors import GatewayError


class Failure(msgspec.Struct, frozen=True):
    """What one process says of an error that the gateway can explain."""

    kind: str
    message: str
    status: int
    type: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None

    @classmethod
    def of(cls, error: GatewayError) -> Failure:
        """Return what another process needs to raise it as well."""
        return cls(
            next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _CLASSES),
            error.message,
            error.status,
            error.type,
            error.code,
            error.param,
            error.retry_after_s,
            error.should_retry,
        )

    def error(self) -> GatewayError:
        """Return the error."""
        found = _CLASSES[self.kind](
            self.message, param=self.param, status=self.status, retry_after_s=self.retry_after_s
        )
        found.type, found.code, found.should_retry = self.type, self.code, self.should_retry
        return found


_CLASSES: dict[str, type[GatewayError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, GatewayError) and kind.__init__ is GatewayError.__init__
}
"""Those of `gateway.errors`; a class of another module travels as the nearest of these that it is one of."""
