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
    client dialect. ``tenant`` is always ``default`` until tenants exist.
    """

    id: str
    key_id: str
    allow: tuple[str, ...]
    scopes: frozenset[Scope] = frozenset({"chat"})
    namespace: str = "default"
    profile: Profile = "openai"
    tenant: str = "default"

    @property
    def is_admin(self) -> bool:
        """Whether the key carries the scope ``admin``."""
        return "admin" in self.scopes
