"""Prometheus metrics of workloads, of the devices that they share, and of swaps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily

from shared_store.base.workload_states import WorkloadState
from shared_store.store.observe.families import durations, gauge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from shared_store.base.status import Status


def overcommit(status: Status) -> Iterator[Metric]:
    """Yield the metric families of a status."""
    yield from _devices(status)
    yield from _workloads(status)
    yield from _swaps(status)


def _devices(status: Status) -> Iterator[Metric]:
    devices = status.devices
    yield gauge(
        "wooly_overcommit",
        "1 if this store grants the device's memory to workloads; absent if no workload uses it.",
        ("device",),
        [((one.id,), one.overcommit) for one in devices if one.overcommit or one.overcommit_refusal],
    )
    yield gauge(
        "wooly_budget_bytes",
        "Bytes that all workloads may use together, private and shared; absent if unknown.",
        ("device",),
        [((one.id,), one.budget_bytes) for one in devices if one.budget_bytes is not None],
    )
    yield gauge(
        "wooly_reserve_bytes",
        "Bytes that stay free.",
        ("device",),
        [((one.id,), one.reserve_bytes) for one in devices],
    )
    yield gauge(
        "wooly_free_bytes",
        "Bytes that could be granted now, beside the reserve; negative if the reserve is used, absent if unknown.",
        ("device",),
        [((one.id,), one.free_bytes) for one in devices if one.free_bytes is not None],
    )
    yield gauge(
        "wooly_granted_bytes",
        "Bytes that were granted and are not allocated yet.",
        ("device",),
        [((one.id,), one.granted_bytes) for one in devices],
    )
    yield gauge(
        "wooly_foreign_bytes",
        "Bytes used by processes that are no workloads of this store; absent if unknown.",
        ("device",),
        [((one.id,), one.foreign_bytes) for one in devices if one.foreign_bytes is not None],
    )


def _workloads(status: Status) -> Iterator[Metric]:
    workloads = status.workloads
    states = Counter[str](one.state for one in workloads)
    yield gauge(
        "wooly_workloads",
        "Workloads by state.",
        ("state",),
        [((state.value,), states[state.value]) for state in WorkloadState],
    )
    by_device = ("workload", "device")
    yield gauge(
        "wooly_workload_private_bytes",
        "Private bytes of a workload on a device.",
        by_device,
        [((one.name, memory.device), memory.private) for one in workloads for memory in one.memory],
    )
    yield gauge(
        "wooly_workload_shared_bytes",
        "Bytes of segments that a workload maps on a device.",
        by_device,
        [((one.name, memory.device), memory.shared) for one in workloads for memory in one.memory],
    )
    labels = ("workload", "priority")
    yield gauge(
        "wooly_workload_wait_seconds",
        "How long a workload has been waiting for memory; 0 if it does not wait.",
        labels,
        [((one.name, str(one.priority)), one.waits_s) for one in workloads],
    )
    starved = CounterMetricFamily(
        "wooly_workload_starved_seconds", "How long a workload has waited for memory in total.", labels=labels
    )
    swaps = CounterMetricFamily("wooly_workload_swaps", "How often a workload was swapped out.", labels=labels)
    for one in workloads:
        starved.add_metric((one.name, str(one.priority)), one.starved_s)
        swaps.add_metric((one.name, str(one.priority)), one.swaps)
    yield starved
    yield swaps


def _swaps(status: Status) -> Iterator[Metric]:
    found = status.overcommit
    swaps = CounterMetricFamily("wooly_swaps", "Swaps of workloads that are complete.", labels=("direction",))
    moved = CounterMetricFamily(
        "wooly_swapped_bytes", "Bytes that swaps copied between devices and the host.", labels=("direction",)
    )
    for swap in found.swaps:
        swaps.add_metric((swap.direction,), swap.count)
        moved.add_metric((swap.direction,), swap.bytes)
    yield swaps
    yield moved
    yield durations("wooly_swap_step_seconds", "Duration of a swap's part.", "step", found.steps)
    yield durations(
        "wooly_memory_wait_seconds",
        "How long workloads waited for memory, until they were granted it or stopped waiting.",
        "priority",
        found.waits,
    )
    yield gauge(
        "wooly_memory_waiting",
        "Workloads that wait for memory.",
        ("priority",),
        [((str(priority),), count) for priority, count in enumerate(found.waiting)],
    )
    refusals = CounterMetricFamily(
        "wooly_swap_refusals", "Requests to leave that were refused or not answered.", labels=("reason",)
    )
    for refusal in found.refusals:
        refusals.add_metric((refusal.reason,), refusal.count)
    yield refusals
