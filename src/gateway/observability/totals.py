"""Totals: how the numbers of several processes become one set: each sends what changed, one place adds it up."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from gateway.observability.families import GaugeFamily
from gateway.observability.metrics import Metrics

Labels = tuple[str, ...]
Row = tuple[str, Labels, list[float]]

_PER_STEP = 500


class Change(msgspec.Struct, array_like=True):
    """What one process has counted since its last `Change`.

    ``added`` is to be added to counters and histograms; ``shown`` is what gauges stand at, ``summary`` what is behind
    `GET /metrics`, where they have changed.
    """

    added: list[Row] = []
    shown: list[Row] = []
    summary: dict[str, Any] | None = None


class Changes:
    """Looks at a process's own `Metrics` and says what is new."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._sent: dict[tuple[str, Labels], list[float]] = {}
        self._summary: dict[str, Any] | None = None

    def take(self) -> Iterator[Change]:
        """Yield everything that changed since the last time, in pieces small enough for one turn of an event loop."""
        change = Change()
        for family in self._metrics.families:
            rows = iter(family.totals())
            while part := list(islice(rows, _PER_STEP)):
                for labels, numbers in part:
                    self._note(change, (family.name, labels), numbers, is_gauge=isinstance(family, GaugeFamily))
                if len(part) == _PER_STEP:
                    yield change
                    change = Change()
        summary = self._metrics.export_summary()
        if summary != self._summary:
            self._summary = change.summary = summary
        if change != Change():
            yield change

    def _note(self, change: Change, key: tuple[str, Labels], numbers: list[float], *, is_gauge: bool) -> None:
        before = self._sent.get(key)
        if numbers == before or (before is None and not any(numbers)):
            return
        self._sent[key] = numbers
        if is_gauge:
            change.shown.append((*key, numbers))
        else:
            before = before or [0] * len(numbers)
            change.added.append((*key, [new - old for new, old in zip(numbers, before, strict=True)]))


class Sum:
    """The sum of several processes, kept in a `Metrics` of its own."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._families = {family.name: family for family in self.metrics.families}
        self._shown: dict[object, dict[tuple[str, Labels], float]] = {}
        self._summaries: dict[object, dict[str, Any]] = {}

    def add(self, source: object, change: Change) -> None:
        """Take what the process ``source`` sent."""
        for name, labels, numbers in change.added:
            self._families[name].add(labels, numbers)
        for name, labels, (value,) in change.shown:
            self._shown.setdefault(source, {})[(name, labels)] = value
            self._show(name, labels)
        if change.summary is not None:
            self._summaries[source] = change.summary

    def end(self, source: object) -> None:
        """Note that a process is gone: what it has counted stays, what it was doing does not."""
        for name, labels in self._shown.pop(source, {}):
            self._show(name, labels)
        summary = self._summaries.pop(source, None)
        if summary is not None:
            self.metrics.absorb_summary(summary)

    def summary(self) -> dict[str, Any]:
        """Return what `GET /metrics` shows of all processes, those that have ended included."""
        total = Metrics()
        for part in (self.metrics.export_summary(), *self._summaries.values()):
            total.absorb_summary(part)
        return total.snapshot()

    def _show(self, name: str, labels: Labels) -> None:
        family = self._families[name]
        assert isinstance(family, GaugeFamily)
        values = [shown[(name, labels)] for shown in self._shown.values() if (name, labels) in shown]
        family.child(*labels).set(max(values, default=0) if family.is_common else sum(values))
