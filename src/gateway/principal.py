"""Principal: who is asking, and what the key that was shown reaches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta, Struct

Profile = Literal["openai", "openwebui"]
Scope = Literal["chat", "admin", "metrics"]


_Whole = Annotated[int, Meta(ge=1, le=10**12)]


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be used: in any sixty seconds, at one time, in any 24 hours. None: as much as is asked for.

    ``concurrent_runs`` are those under way at one time. ``cost_per_day_usd`` has at most nine decimals.
    """

    requests_per_minute: _Whole | None = None
    tokens_per_minute: _Whole | None = None
    concurrent_runs: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    cost_per_day_usd: Annotated[float, Meta(gt=0, le=1_000_000)] | None = None

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is limited."""
        return self == _UNLIMITED


_UNLIMITED = Limits()


class Allowance(Struct, frozen=True, kw_only=True):
    """The limits of one caller: of the key alone, of its namespace (all keys of it together), of each of its end users.

    A scope without limits is None.
    """

    key: Limits | None = None
    namespace: Limits | None = None
    end_user: Limits | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    ``allow`` holds the fnmatch patterns over ``namespace/name`` that the key reaches, ``allow_by_namespace`` those
    that namespaces give to every key without a list of its own, ``allow_tools`` those of the gateway tools it reaches.
    ``profile`` chooses the client dialect. ``tenant`` is always ``default`` until tenants exist. ``is_drop_in`` marks
    code inside a drop-in that built a client of its own: it reaches upstream models only, by the names an agent may
    use. ``allowance`` is None for a caller without limits. Who came with a token has the name of its ``issuer``, and
    the moment it ends (``expires_at``, epoch seconds). ``digest`` is that of the secret that was shown: a key that is
    being rotated has two.
    """

    id: str
    key_id: str
    allow: tuple[str, ...]
    scopes: frozenset[Scope] = frozenset({"chat"})
    namespace: str = "default"
    profile: Profile = "openai"
    tenant: str = "default"
    is_drop_in: bool = False
    allow_tools: tuple[str, ...] = ()
    allowance: Allowance | None = None
    allow_by_namespace: tuple[str, ...] = ()
    issuer: str | None = None
    expires_at: float | None = None
    digest: str = field(default="", repr=False, compare=False)

    @property
    def is_admin(self) -> bool:
        """Whether the key carries the scope ``admin``."""
        return "admin" in self.scopes
