"""Metric families of one event loop: counters, gauges and histograms that `prometheus_client` collects.

They count without locks and find a bucket by bisection: its own classes cost four times as much for each observation,
and a call makes a dozen. Children are looked up by their label values; past ``limit`` of them, new ones share one
whose labels all read ``other``.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

C = TypeVar("C")

OTHER = "other"
LONGEST_LABEL = 128


class Family(Collector, Generic[C]):
    """One metric and its children by label values."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = (), limit: int = 1_000) -> None:
        self.name, self.documentation, self.labels = name, documentation, tuple(labels)
        self._limit = limit
        self._children: dict[tuple[str, ...], C] = {}
        self._shown: dict[tuple[str, ...], C] = {}
        if not self.labels:
            self.child()

    def child(self, *labels: str) -> C:
        """Return what counts for these label values."""
        found = self._children.get(labels)
        return found if found is not None else self._add(labels)

    def _add(self, labels: tuple[str, ...]) -> C:
        full = len(self._children) >= self._limit
        shown = tuple(OTHER if full else label[:LONGEST_LABEL] for label in labels)
        child = self._shown.get(shown)
        if child is None:
            child = self._shown[shown] = self._new()
        if not full:
            self._children[labels] = child
        return child

    def _children_now(self) -> list[tuple[tuple[str, ...], C]]:
        # A copy: an author's own event loop, in a thread, may add one in the middle of a scrape.
        return list(self._shown.items())

    @abstractmethod
    def _new(self) -> C:
        """Return a child that has counted nothing."""

    @abstractmethod
    def collect(self) -> Iterable[Metric]:
        """Return the family's present samples."""


class Count:
    """A number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add."""
        self.value += amount

    def dec(self) -> None:
        """Take one away."""
        self.value -= 1

    def set(self, value: float) -> None:
        """Replace."""
        self.value = value


class CounterFamily(Family[Count]):
    """Numbers that only grow."""

    def _new(self) -> Count:
        return Count()

    def collect(self) -> Iterable[Metric]:
        """See `Family.collect`."""
        metric = CounterMetricFamily(self.name, self.documentation, labels=self.labels)
        for labels, child in self._children_now():
            metric.add_metric(labels, child.value)
        return (metric,)


class GaugeFamily(Family[Count]):
    """Numbers that go up and down."""

    def _new(self) -> Count:
        return Count()

    def collect(self) -> Iterable[Metric]:
        """See `Family.collect`."""
        metric = GaugeMetricFamily(self.name, self.documentation, labels=self.labels)
        for labels, child in self._children_now():
            metric.add_metric(labels, child.value)
        return (metric,)


class Distribution:
    """How many observations fell into each bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.total += value
        self.counts[bisect_left(self.bounds, value)] += 1


class HistogramFamily(Family[Distribution]):
    """Distributions over the same buckets."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: Iterable[float], limit: int = 1_000
    ) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._names = [str(bound) for bound in self._bounds] + ["+Inf"]
        super().__init__(name, documentation, labels, limit)

    def _new(self) -> Distribution:
        return Distribution(self._bounds)

    def collect(self) -> Iterable[Metric]:
        """See `Family.collect`."""
        metric = HistogramMetricFamily(self.name, self.documentation, labels=self.labels)
        for labels, child in self._children_now():
            metric.add_metric(labels, list(zip(self._names, accumulate(child.counts), strict=True)), child.total)
        return (metric,)
