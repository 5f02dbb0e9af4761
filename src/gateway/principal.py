"""Principal: who is asking, and what the key that was shown reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Profile = Literal["openai", "openwebui"]
Scope = Literal["chat", "admin", "metrics"]


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    ``allow`` holds the fnmatch patterns over ``namespace/name`` that the key reaches. ``profile`` chooses the
    client dialect. ``tenant`` is always ``default`` until tenants exist. ``is_drop_in`` marks code inside a drop-in
    that built a client of its own: it reaches upstream models only, by the names an agent may use.
    """

    id: str
    key_id: str
    allow: tuple[str, ...]
    scopes: frozenset[Scope] = frozenset({"chat"})
    namespace: str = "default"
    profile: Profile = "openai"
    tenant: str = "default"
    is_drop_in: bool = False

    @property
    def is_admin(self) -> bool:
        """Whether the key carries the scope ``admin``."""
        return "admin" in self.scopes
