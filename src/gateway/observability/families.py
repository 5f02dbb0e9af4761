"""Metric families of one event loop: counters, gauges and histograms, and each one's lines of the exposition.

They count without locks and find a bucket by bisection: the classes of `prometheus_client` cost four times as much for
each observation, and a call makes a dozen; its writer costs ten times as much for each line. Children are looked up by
their label values; past ``limit`` of them, new ones share one whose labels all read ``other``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

C = TypeVar("C", bound="Child")

OTHER = "other"
LONGEST_LABEL = 128


class Family(ABC, Generic[C]):
    """One metric and its children by label values. A counter's ``name`` is without the ``_total`` of its samples."""

    kind: ClassVar[Literal["counter", "gauge", "histogram"]]

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = (), limit: int = 1_000) -> None:
        self.name, self.documentation, self.labels = name, documentation, tuple(labels)
        self._limit = limit
        self._children: dict[tuple[str, ...], C] = {}
        self._shown: dict[tuple[str, ...], C] = {}
        self._written: dict[tuple[str, ...], str] = {}
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

    def head(self, *, openmetrics: bool) -> str:
        """Return the two lines of comment that come before the family's samples."""
        name = f"{self.name}_total" if self.kind == "counter" and not openmetrics else self.name
        return f"# HELP {name} {self.documentation}\n# TYPE {name} {self.kind}\n"

    def totals(self) -> list[tuple[tuple[str, ...], list[float]]]:
        """Return the numbers of every child by its label values, as `add` takes them."""
        return [(labels, child.numbers()) for labels, child in list(self._shown.items())]

    def add(self, labels: tuple[str, ...], numbers: Sequence[float]) -> None:
        """Add what another process has counted for these label values since it last told."""
        self.child(*labels).add(numbers)

    def texts(self) -> Iterator[str]:
        """Yield the lines of one child after the other, as it stands when it is asked for."""
        # A copy: an author's own event loop, in a thread, may add one in the middle of a scrape.
        for labels, child in list(self._shown.items()):
            written = self._written.get(labels)
            if written is None:
                pairs = sorted(zip(self.labels, labels, strict=True))
                written = self._written[labels] = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)
            yield self._text(written, child)

    @abstractmethod
    def _new(self) -> C:
        """Return a child that has counted nothing."""

    @abstractmethod
    def _text(self, labels: str, child: C) -> str:
        """Return the lines of a child; ``labels`` are written already, without the braces."""


class Child(Protocol):
    """What a family counts with."""

    def numbers(self) -> list[float]:
        """Return what has been counted."""
        ...

    def add(self, numbers: Sequence[float]) -> None:
        """Count what another one has counted."""
        ...


class Count:
    """A number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add."""
        self.value += amount

    def set(self, value: float) -> None:
        """Replace."""
        self.value = value

    def numbers(self) -> list[float]:
        """Return the number alone."""
        return [self.value]

    def add(self, numbers: Sequence[float]) -> None:
        """Add one."""
        (value,) = numbers
        self.value += value


class CounterFamily(Family[Count]):
    """Numbers that only grow."""

    kind = "counter"

    def _new(self) -> Count:
        return Count()

    def _text(self, labels: str, child: Count) -> str:
        return f"{self.name}_total{_braced(labels)} {child.value!r}\n"


class GaugeFamily(Family[Count]):
    """Numbers that go up and down.

    ``is_common``: every process of a gateway shows the same thing, so that several show the highest, not the sum.
    """

    kind = "gauge"

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = (), *, is_common: bool = False) -> None:
        super().__init__(name, documentation, labels)
        self.is_common = is_common

    def _new(self) -> Count:
        return Count()

    def _text(self, labels: str, child: Count) -> str:
        return f"{self.name}{_braced(labels)} {child.value!r}\n"


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

    def numbers(self) -> list[float]:
        """Return the count of each bucket, the one without a bound last, then the sum."""
        return [*self.counts, self.total]

    def add(self, numbers: Sequence[float]) -> None:
        """Add as many."""
        *counts, total = numbers
        for index, count in enumerate(counts):
            self.counts[index] += int(count)
        self.total += total


class HistogramFamily(Family[Distribution]):
    """Distributions over the same buckets."""

    kind = "histogram"

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: Iterable[float], limit: int = 1_000
    ) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._names = [str(bound) for bound in self._bounds] + ["+Inf"]
        super().__init__(name, documentation, labels, limit)

    def _new(self) -> Distribution:
        return Distribution(self._bounds)

    def _text(self, labels: str, child: Distribution) -> str:
        start = f'{self.name}_bucket{{{labels}{"," if labels else ""}le="'
        sums = list(accumulate(child.counts))
        lines = [f'{start}{name}"}} {count}\n' for name, count in zip(self._names, sums, strict=True)]
        braced = _braced(labels)
        lines.append(f"{self.name}_count{braced} {sums[-1]}\n{self.name}_sum{braced} {child.total!r}\n")
        return "".join(lines)


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
