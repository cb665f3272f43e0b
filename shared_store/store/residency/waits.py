"""The reasons for which a request for memory waits, in words. No decision depends on them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from shared_store.base.sizes import format_size
from shared_store.base.workload_states import WorkloadState
from shared_store.store.residency.snapshot import MemoryRequest, Snapshot, Wait, WorkloadView

FOREIGN = "foreign processes"
RESERVE = "reserve"

_SHOWN = 8
"""Holders in a text: a node may have hundreds."""


def explain(
    request: MemoryRequest,
    snapshot: Snapshot,
    now: float,
    *,
    missing: Mapping[str, int],
    ahead: Sequence[str],
    leaving: Collection[str],
    times: Mapping[str, float | None],
) -> Wait:
    """Return why a request waits.

    Args:
        request: the request.
        snapshot: the node.
        now: the present.
        missing: bytes by device beyond those that are free, or about to be.
        ahead: requests that are served first.
        leaving: workloads on their way out.
        times: when each other workload may be taken from; infinity: after its return; None: not as time passes.
    """
    devices = missing or request.needs
    held = {one.name: _held(snapshot, one, devices) for one in snapshot.workloads.values()}
    holders = sorted((name for name in held if held[name] and name != request.name), key=lambda one: (-held[one], one))
    blocked_by = [*ahead, *(name for name in holders if name not in ahead)]
    lines = [
        f"{format_size(request.needs[device])} needed on {device}, {format_size(nbytes)} missing"
        for device, nbytes in missing.items()
    ]
    if ahead:
        lines.append(f"served first: {', '.join(ahead[:_SHOWN])}")
    for name in holders[:_SHOWN]:
        workload = snapshot.workloads[name]
        why = "leaves now" if name in leaving else _why(workload, times.get(name), now)
        lines.append(f"{name} (P{workload.priority}) has {format_size(held[name])}: {why}")
    if len(holders) > _SHOWN:
        lines.append(f"{len(holders) - _SHOWN} more workloads")
    for device, nbytes in missing.items():
        memory = snapshot.devices.get(device)
        if memory is not None and memory.foreign:
            blocked_by.append(FOREIGN)
            lines.append(f"{FOREIGN} have {format_size(memory.foreign)} on {device}")
        if memory is not None and 0 < nbytes <= memory.reserve:
            blocked_by.append(RESERVE)
            lines.append(f"the {RESERVE} of {format_size(memory.reserve)} would be enough")
    lines.extend(_help(request, snapshot, missing, holders, times))
    return Wait(request.name, tuple(dict.fromkeys(blocked_by)), "; ".join(lines) or "waits for the next decision")


def _held(snapshot: Snapshot, workload: WorkloadView, devices: Collection[str]) -> int:
    """Return the bytes that would not be on some devices without a workload: private, and shared with others."""
    private = sum(workload.leaves.get(device, 0) for device in devices)
    return private + sum(
        segment.nbytes
        for segment in snapshot.segments.values()
        if segment.device in devices and workload.name in segment.readers
    )


def _why(workload: WorkloadView, at: float | None, now: float) -> str:
    if not workload.swappable:
        return f"not swappable ({workload.refusal})" if workload.refusal else "not swappable"
    if workload.starting:
        return "starts"
    if workload.state is not WorkloadState.RESIDENT:
        return f"{workload.state.value}"
    if now < workload.declined_until:
        return f"declined, asked again in {workload.declined_until - now:.1f} s"
    if at is None:
        return "busy"
    if at > now and at != math.inf:
        return f"may be swapped out in {at - now:.1f} s"
    return "may be swapped out, which is not enough"


def _help(
    request: MemoryRequest,
    snapshot: Snapshot,
    missing: Mapping[str, int],
    holders: Sequence[str],
    times: Mapping[str, float | None],
) -> Iterator[str]:
    """Yield what would help where waiting does not."""
    for device in missing:
        memory = snapshot.devices.get(device)
        most = memory.budget - memory.reserve if memory is not None else 0
        if memory is None:
            yield f"this store has no device {device}"
        elif 0 < most < request.needs[device]:
            yield f"never fits: {device} has {format_size(most)} without the reserve; raise --budget, or need less"
    if any(times.get(name) is not None for name in holders):
        return
    busy = [name for name in holders if snapshot.workloads[name].swappable]
    fixed = [name for name in holders if not snapshot.workloads[name].swappable]
    if busy:
        yield f"helps: an end of work in {busy[0]}, or `wooly swap out {busy[0]}`"
    elif fixed:
        yield f"helps: the end of {fixed[0]}"
