"""Metric families of Prometheus, made from values."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from shared_store.base.status import LATENCY_BOUNDS_S, DurationStatus

if TYPE_CHECKING:
    from collections.abc import Iterable


def single(name: str, text: str, value: float) -> Metric:
    """Return a gauge without labels."""
    return GaugeMetricFamily(name, text, value)


def gauge(name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """Return a gauge with a value for each tuple of the labels' values."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def durations(name: str, text: str, label: str, rows: Iterable[DurationStatus]) -> Metric:
    """Return a histogram with one label, the name of each row."""
    family = HistogramMetricFamily(name, text, labels=(label,))
    for row in rows:
        family.add_metric((row.name,), buckets(LATENCY_BOUNDS_S, row.classes), row.total_s)
    return family


def buckets(bounds: tuple[float, ...], classes: tuple[int, ...]) -> list[tuple[str, float]]:
    """Return the cumulative counts of classes by their upper bounds, as Prometheus has them."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(classes), strict=True))
