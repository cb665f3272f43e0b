"""Why a workload is held, in words. Pure: from the status of all workloads.

The arbiter says which workloads are held, and not for which ones: that follows from its rules, see
:mod:`shared_store.compute.decision`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from shared_store.base.workload_states import WorkloadState
from shared_store.base.workloads import ComputeStatus, WorkloadStatus

_RECENT: Final = 0.005
"""Part of its devices' time in the last seconds from which a workload that has no requests now counts as at work."""


def holders(row: WorkloadStatus, workloads: Sequence[WorkloadStatus]) -> tuple[WorkloadStatus, ...]:
    """Return the workloads for which one is held: more important ones, else equals. Empty if it is not held."""
    if row.compute is None or not row.compute.held:
        return ()
    beside = tuple(_beside(row, workloads))
    above = tuple(one for one in beside if one.priority < row.priority)
    return above or tuple(one for one in beside if one.priority == row.priority)


def lines(row: WorkloadStatus, workloads: Sequence[WorkloadStatus], max_hold_s: float = 0.0) -> Iterator[str]:
    """Yield lines about a workload's turns: for which others it is held, and what would help.

    Args:
        row: the workload.
        workloads: all of the store.
        max_hold_s: seconds after which a held workload makes one step; 0: it makes none.
    """
    found = row.compute
    if found is None:
        return
    if found.stalled:
        yield "it has work and made no progress for a second (is its process stopped?): no other workload waits for it"
    if found.held:
        yield from _held(row, found, workloads, max_hold_s)
    if found.ungated:
        yield f"it is not held: {found.ungated}"
    if found.exclusive:
        yield "no other workload may use its devices (GPU_MODE=Exclusive)"
    if found.device_s or found.held_s:
        estimated = f", {found.estimated_s:.1f} s of it estimated" if found.estimated_s else ""
        yield (
            f"it used {found.device_s:.1f} s of its devices{estimated}, {found.used_share:.0%} of their time lately, "
            f"and was held for {found.held_s:.1f} s"
        )


def _held(
    row: WorkloadStatus, found: ComputeStatus, workloads: Sequence[WorkloadStatus], max_hold_s: float
) -> Iterator[str]:
    behind = holders(row, workloads)
    if any(one.priority < row.priority for one in behind):
        step = f"; after {max_hold_s:g} s it makes one step all the same" if max_hold_s else ""
        yield f"it is held while more important workloads work: {_names(behind)}{step}"
        highest = min(one.priority for one in behind)
        yield f"a priority as high as theirs ends that: `wooly priority {row.name} {highest}`"
    elif behind:
        share = f"its share is {found.share:g}%" if found.share else "it has an equal part of what shares leave"
        yield f"it waits for its turn, {share}, beside: {_names(behind)}"
        yield f"a larger share makes its turns more frequent: `wooly share {row.name} PERCENT`"
    else:
        yield "it is held for work that has ended since"


def _beside(row: WorkloadStatus, workloads: Sequence[WorkloadStatus]) -> Iterator[WorkloadStatus]:
    """Yield the workloads on its devices for which it can be held: those at work."""
    devices = {memory.device for memory in row.memory}
    for one in workloads:
        if one.name == row.name or one.compute is None or one.compute.stalled:
            continue
        at_work = one.busy or one.running or one.waiting or one.compute.used_share >= _RECENT
        if at_work and one.state == WorkloadState.RESIDENT.value and devices & {memory.device for memory in one.memory}:
            yield one


def _names(workloads: Sequence[WorkloadStatus]) -> str:
    return ", ".join(
        f"{one.name} (P{one.priority}, {one.compute.used_share:.0%} lately)" for one in workloads if one.compute
    )
