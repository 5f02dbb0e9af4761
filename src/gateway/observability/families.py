"""Metric families of one event loop: counters, gauges and histograms, and each one's lines of the exposition.

They count without locks and find a bucket by bisection: the classes of `prometheus_client` cost four times as much for
each observation, and a call makes a dozen; its writer costs ten times as much for each line. Children are looked up by
their label values; past ``limit`` of them, new ones share one whose labels all read ``other``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
    """How many observations fell into each bucket, and their sum.

    ``observe`` counts one value. A call makes a dozen of them: they are only kept, and put into their buckets together
    by `settle`, which whoever owns the family calls now and then, and which every reading begins with.
    """

    __slots__ = ("_bounds", "_counts", "_total", "_waiting", "observe")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._waiting: list[float] = []
        self.observe: Callable[[float], None] = self._waiting.append

    def settle(self) -> None:
        """Put what was observed into its buckets."""
        values = self._waiting[:]
        if values:
            del self._waiting[: len(values)]  # another thread may have added one meanwhile
            self._total += sum(values)
            for bucket, count in Counter(map(partial(bisect_left, self._bounds), values)).items():
                self._counts[bucket] += count

    def numbers(self) -> list[float]:
        """Return the count of each bucket, the one without a bound last, then the sum."""
        self.settle()
        return [*self._counts, self._total]

    def add(self, numbers: Sequence[float]) -> None:
        """Add as many."""
        *counts, total = numbers
        for index, count in enumerate(counts):
            self._counts[index] += int(count)
        self._total += total


class Spread:
    """How many observations there were, their sum, the least and the greatest; ``observe`` as in `Distribution`."""

    __slots__ = ("_waiting", "count", "greatest", "least", "observe", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = self.greatest = 0.0
        self.least: float | None = None
        self._waiting: list[float] = []
        self.observe: Callable[[float], None] = self._waiting.append

    def settle(self) -> None:
        """Take what was observed into the numbers, which are of no use before."""
        values = self._waiting[:]
        if values:
            del self._waiting[: len(values)]
            self.add(len(values), sum(values), min(values), max(values))

    def add(self, count: int, total: float, least: float | None, greatest: float) -> None:
        """Add as many."""
        self.count += count
        self.total += total
        self.greatest = max(self.greatest, greatest)
        if least is not None:
            self.least = least if self.least is None else min(self.least, least)


class HistogramFamily(Family[Distribution]):
    """Distributions over the same buckets."""

    kind = "histogram"

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: Iterable[float], limit: int = 1_000
    ) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._names = [str(bound) for bound in self._bounds] + ["+Inf"]
        super().__init__(name, documentation, labels, limit)

    def settle(self) -> None:
        """Put what was observed into its buckets."""
        for child in list(self._shown.values()):
            child.settle()

    def _new(self) -> Distribution:
        return Distribution(self._bounds)

    def _text(self, labels: str, child: Distribution) -> str:
        start = f'{self.name}_bucket{{{labels}{"," if labels else ""}le="'
        *counts, total = child.numbers()
        sums = list(accumulate(map(int, counts)))
        lines = [f'{start}{name}"}} {count}\n' for name, count in zip(self._names, sums, strict=True)]
        braced = _braced(labels)
        lines.append(f"{self.name}_count{braced} {sums[-1]}\n{self.name}_sum{braced} {total!r}\n")
        return "".join(lines)


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
