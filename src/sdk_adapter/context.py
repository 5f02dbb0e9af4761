"""The context object that tools, hooks, guardrails and callable instructions see as ``ctx.context``.

A plain mapping with attribute access. Documented names always answer (None or empty where a request had nothing to
say); other names are the author's own and live in ``state``, so that an agent written for a context class of its
own (``ctx.context.seat_number = "12A"``) works unchanged. ``json.dumps(ctx.context)`` works as long as the author
keeps JSON values in ``state``.
"""

from __future__ import annotations

from typing import Any

from gateway.caller_context import CallerContext
from gateway.run import Run


class _Fields(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name!r} is not part of the context object") from None


class PrincipalContext(_Fields):
    """Who is asking: ``id``, ``key_id``, ``namespace``, ``scopes`` (a sorted list)."""


class GatewayContext(_Fields):
    """One run as its agents see it.

    ``run_id``, ``request_id``, ``principal``, ``model`` (the canonical id), ``session_id`` (or None), ``metadata``
    (the request's), ``headers`` (allow-listed, lower-case), ``state`` (a dict for the author). Agents used as tools
    and runs started by a tool that passes its context on share the same object.

    ``caller`` (`gateway.caller_context.CallerContext`) is an attribute only: it holds the caller's credentials, and
    whoever writes the mapping down does not write them.
    """

    caller: CallerContext

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        try:
            return self["state"][name]
        except KeyError:
            raise AttributeError(
                f"The run's context has no {name!r}. It has {', '.join(self)}; what your own code sets is in 'state'."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            self[name] = value
        elif name == "caller":
            object.__setattr__(self, name, value)
        else:
            self["state"][name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self["state"][name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def of(cls, run: Run) -> GatewayContext:
        """Return the context of a run; ``run_id`` is the hex form that every surface derives its ids from."""
        principal = run.principal
        context = cls(
            run_id=run.id.hex,
            request_id=run.request_id,
            principal=PrincipalContext(
                id=principal.id,
                key_id=principal.key_id,
                namespace=principal.namespace,
                scopes=sorted(principal.scopes),
            ),
            model=run.model,
            session_id=run.session_id,
            metadata=dict(run.metadata),
            headers=dict(run.headers),
            state={},
        )
        context.caller = run.caller
        return context
