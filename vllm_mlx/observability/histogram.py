"""A histogram that may be told of every token: one bisection and one increment, no lock. asyncio thread only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class QuickHistogram(Collector):
    """Counts values by one label. prometheus_client's own takes a lock and walks its buckets for each value."""

    def __init__(self, name: str, help_text: str, label: str, edges: Sequence[float]) -> None:
        self._name, self._help, self._label = name, help_text, label
        self._edges = tuple(edges)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, label_value: str, value: float) -> None:
        counts = self._counts.get(label_value)
        if counts is None:
            counts = self._counts[label_value] = [0] * (len(self._edges) + 1)
            self._sums[label_value] = 0.0
        counts[bisect_left(self._edges, value)] += 1
        self._sums[label_value] += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=[self._label])
        names = [*(str(float(edge)) for edge in self._edges), "+Inf"]
        for label_value, counts in self._counts.items():
            total, buckets = 0, []
            for name, count in zip(names, counts, strict=True):
                total += count
                buckets.append((name, float(total)))
            family.add_metric([label_value], buckets, self._sums[label_value])
        yield family
