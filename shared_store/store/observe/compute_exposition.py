"""Prometheus metrics of what workloads compute, and of the arbiter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily

from shared_store.store.observe.families import gauge, single

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from shared_store.base.status import Status


def compute(status: Status) -> Iterator[Metric]:
    """Yield the metric families of a status; none for a store without an arbiter."""
    if status.arbiter is None:
        return
    yield single(
        "wooly_arbiter_up",
        "1 if workloads of one device compute in turn, or none needs it; 0 while the arbiter is lost.",
        status.arbiter.state != "lost",
    )
    yield CounterMetricFamily(
        "wooly_arbiter_restarts",
        "How often the arbiter was started again since the store started.",
        status.arbiter.restarts,
    )
    rows = [((one.name, str(one.priority)), one.compute) for one in status.workloads if one.compute is not None]
    labels = ("workload", "priority")
    used = CounterMetricFamily(
        "wooly_workload_device_seconds", "Seconds of its devices that a workload used.", labels=labels
    )
    estimated = CounterMetricFamily(
        "wooly_workload_device_estimated_seconds",
        "The part of the device seconds in which steps of several workloads overlapped, and its part was estimated.",
        labels=labels,
    )
    held = CounterMetricFamily(
        "wooly_workload_held_seconds", "How long a workload was held for others in total.", labels=labels
    )
    for values, row in rows:
        used.add_metric(values, row.device_s)
        estimated.add_metric(values, row.estimated_s)
        held.add_metric(values, row.held_s)
    yield used
    yield estimated
    yield held
    yield gauge(
        "wooly_workload_held",
        "1 while a workload is held for others.",
        labels,
        [(values, row.held) for values, row in rows],
    )
    yield gauge(
        "wooly_workload_stalled",
        "1 while a workload has work and makes no progress, so that no other one waits for it.",
        labels,
        [(values, row.stalled) for values, row in rows],
    )
    yield gauge(
        "wooly_workload_share_ratio",
        "Share of a workload in its devices' time, 0 to 1; 0: an equal part of what the others leave.",
        labels,
        [(values, row.share / 100) for values, row in rows],
    )
    yield gauge(
        "wooly_workload_used_share_ratio",
        "Part of its devices' time that a workload used in the last 10 seconds, 0 to 1.",
        labels,
        [(values, row.used_share) for values, row in rows],
    )
