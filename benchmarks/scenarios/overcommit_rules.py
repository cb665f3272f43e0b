"""Other ways to share a device's memory, as policies for the simulated node: what ours is compared with."""

from __future__ import annotations

from collections.abc import Callable

from support.overcommit_world import DEVICE, Decide

from shared_store.base.workload_states import WorkloadState
from shared_store.store.residency.policy import Decision, Grant, Settings, Snapshot, Victim, WorkloadView, decide

BY_HAND_IDLE_S = 60.0
"""A script that puts engines to sleep does so after this time without requests."""

Select = Callable[[WorkloadView, float], tuple[float, ...] | None]
"""Order in which workloads leave, least first; None: it may not leave now."""


def first_come(workload: WorkloadView, _: float) -> tuple[float, ...] | None:
    """Let nobody leave that has work; the one that came first leaves first."""
    return None if workload.running else (workload.resident_since,)


def least_recently_used(workload: WorkloadView, _: float) -> tuple[float, ...] | None:
    """Let the one that was used longest ago leave; if all have work, the one that has been there for longest."""
    return (0.0, workload.idle_since) if not workload.running else (1.0, workload.resident_since)


def by_hand(workload: WorkloadView, now: float) -> tuple[float, ...] | None:
    """Let those leave that had no request for a while."""
    if workload.running or now - workload.idle_since < BY_HAND_IDLE_S:
        return None
    return (workload.idle_since,)


def in_order_of_arrival(select: Select) -> Decide:
    """Return a policy that serves requests in order of arrival, one at a time, whatever their priority."""

    def policy(snapshot: Snapshot, _: Settings, now: float) -> Decision:
        request = min(snapshot.requests, key=lambda one: (one.since, one.name))
        free = snapshot.devices[DEVICE].free
        needed = request.needs[DEVICE]
        if needed <= free:
            return Decision((Grant(request.name),))
        gone = {one.name for one in snapshot.workloads.values() if one.state is WorkloadState.LEAVING}
        ordered = [
            (place, workload.name)
            for workload in snapshot.workloads.values()
            if workload.state is WorkloadState.RESIDENT and (place := select(workload, now)) is not None
        ]
        victims: list[Victim] = []
        ordered.sort(reverse=True)
        while free + _freed(snapshot, gone, request.maps) < needed and ordered:
            name = ordered.pop()[1]
            gone.add(name)
            victims.append(Victim(name, request.name, active=True, reason=""))
        if free + _freed(snapshot, gone, request.maps) < needed:
            return Decision(wake_at=now + 1.0)
        return Decision(victims=tuple(victims))

    return policy


def _freed(snapshot: Snapshot, gone: set[str], maps: frozenset[int]) -> int:
    private = sum(snapshot.workloads[name].leaves[DEVICE] for name in gone)
    return private + sum(
        segment.nbytes
        for number, segment in snapshot.segments.items()
        if segment.readers <= gone and number not in maps
    )


POLICIES: dict[str, Decide] = {
    "wooly": decide,
    "first_come": in_order_of_arrival(first_come),
    "lru": in_order_of_arrival(least_recently_used),
    "by_hand": in_order_of_arrival(by_hand),
}
"""Policies by name in the results."""
