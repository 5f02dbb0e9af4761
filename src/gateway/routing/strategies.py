"""In which order the targets of a model are asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.routing.config import Strategy
from gateway.routing.health import TargetHealth
from gateway.routing.targets import Server

EXPLORED = 0.05
"""Share of calls that ``lowest_latency`` sends elsewhere, so that a target that was slow once is measured again."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model of one upstream that may serve a route."""

    target: Server
    model: str
    health: TargetHealth
    weight: float = 1.0

    @property
    def id(self) -> str:
        """``upstream/model``."""
        return f"{self.target.name}/{self.model}"


def in_order(strategy: Strategy, candidates: Sequence[Candidate], chance: random.Random) -> list[Candidate]:
    """Return the candidates, the one to ask first in front."""
    if strategy == "weighted":
        # Efraimidis and Spirakis: sorting by u^(1/w) draws without replacement, in proportion to the weights.
        return sorted(candidates, key=lambda item: chance.random() ** (1.0 / item.weight), reverse=True)
    if strategy == "least_busy":
        return sorted(candidates, key=lambda item: (item.health.in_flight + 1) / item.weight)
    if strategy == "lowest_latency":
        ordered = sorted(candidates, key=lambda item: item.health.latency_s or 0.0)
        if len(ordered) > 1 and chance.random() < EXPLORED:
            ordered.insert(0, ordered.pop(chance.randrange(1, len(ordered))))
        return ordered
    return list(candidates)
