"""The node as the policy sees it: a snapshot of workloads, segments, accounts and waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared_store.store.observe.workloads import WorkloadStatuses
from shared_store.store.residency.policy import (
    DeviceMemory,
    MemoryRequest,
    SegmentView,
    Snapshot,
    WorkloadView,
)
from shared_store.store.residency.snapshot import NEVER
from shared_store.store.state.accounts import ENDLESS
from shared_store.store.state.sharing import Sharing, sharing
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import AWAY, Wait, Workload

FIRST_STEP_S: Final = 2.0
"""Seconds after its return in which a workload counts as one with a request, until its first step."""


@dataclass(frozen=True, eq=False)
class NodeView:
    """Takes snapshots for the policy."""

    _state: StoreState
    _statuses: WorkloadStatuses

    def take(self, now: float, *, may_evict: bool = True) -> Snapshot:
        """Return the node as it is now.

        Args:
            now: monotonic seconds.
            may_evict: False: count nothing as freed by the eviction of models.
        """
        used = sharing(self._state)
        workloads = self._state.workloads.all()
        return Snapshot(
            {device: self._memory(device, used, may_evict=may_evict) for device in self._devices()},
            {workload.name: self._view(workload, used, now) for workload in workloads},
            self._segments(used),
            self._requests(used),
        )

    def needs(self, wait: Wait, used: Sharing) -> dict[str, int]:
        """Return the bytes that a wait is for, by device: its own, and segments that return with the workload."""
        found = {device: nbytes for device, nbytes in wait.needs.items() if self._state.accounts.open(device)}
        workload = self._state.workloads.get(wait.workload)
        for device, nbytes in (workload.off or {}).items() if workload is not None else ():
            if self._state.accounts.open(device):
                found[device] = found.get(device, 0) + nbytes  # what the driver brings back first
        for segment in used.absent.get(wait.workload, ()) if not wait.publishes else ():
            entry = self._state.segments.at(segment)
            if self._state.accounts.open(entry.device):
                found[entry.device] = found.get(entry.device, 0) + entry.nbytes
        return found

    def name(self, wait: Wait) -> str:
        """Return the name under which a wait is known to the policy."""
        workload = self._state.workloads.get(wait.workload)
        return workload.name if workload is not None else wait.client

    def _devices(self) -> list[str]:
        return [device for device in self._state.accounts.devices() if self._state.accounts.open(device)]

    def _memory(self, device: str, used: Sharing, *, may_evict: bool) -> DeviceMemory:
        account = self._state.accounts.account(device)
        cached = sum(use.nbytes for use in used.resident.values() if use.device == device and use.cached)
        return DeviceMemory(
            ENDLESS if account.free is None else account.free,
            cached if may_evict and not self._state.grace.active else 0,
            account.budget or 0,
            account.reserve,
            account.taken,
        )

    def _view(self, workload: Workload, used: Sharing, now: float) -> WorkloadView:
        activity = self._statuses.activity(used.members.get(workload.id, ()))
        since = workload.since if workload.resident_since is None else workload.resident_since
        running = waiting = 0
        idle_since = since
        if activity is not None:
            running = max(activity.running, int(activity.busy))
            waiting = activity.waiting
            if activity.idle_s is not None:
                idle_since = max(since, now - activity.idle_s)
            stepped = activity.idle_s is not None and now - activity.idle_s >= since
            if workload.in_s and not stepped and now - since < FIRST_STEP_S:
                waiting = max(waiting, 1)
        return WorkloadView(
            workload.name,
            workload.priority,
            workload.state,
            self._leaves(workload),
            not workload.refusal,
            workload.refusal,
            running,
            waiting,
            idle_since,
            since,
            workload.cost_s,
            NEVER if workload.taken_at is None else workload.taken_at,
            workload.asked,
            workload.spared_until or NEVER,
            workload.starting,
        )

    def _leaves(self, workload: Workload) -> dict[str, int]:
        """Return what a workload would free by device: of one that returns, what it will have then."""
        return {
            device: workload.leaves(device) + self._state.workloads.grant_left(workload, device)
            for device in workload.devices
            if self._state.accounts.open(device)
        }

    def _segments(self, used: Sharing) -> dict[int, SegmentView]:
        """Return the segments on devices. Those that a workload maps when it returns have it as a reader already."""
        names = {workload.id: workload.name for workload in self._state.workloads.all()}
        coming: dict[int, set[str]] = {}
        for workload in self._state.workloads.all():
            if workload.state not in AWAY:
                for segment in used.maps.get(workload.id, ()):
                    coming.setdefault(segment, set()).add(workload.name)
        return {
            segment: SegmentView(
                use.device,
                use.nbytes,
                frozenset({*(names[reader] for reader in use.readers), *coming.get(segment, ())}),
                use.held,
            )
            for segment, use in used.resident.items()
        }

    def _requests(self, used: Sharing) -> tuple[MemoryRequest, ...]:
        requests: dict[str, MemoryRequest] = {}
        for wait in self._state.workloads.waits:
            name = self.name(wait)
            requests.setdefault(
                name,
                MemoryRequest(
                    name,
                    self._priority(wait),
                    self.needs(wait, used),
                    frozenset(used.maps.get(wait.workload, ())),
                    wait.since,
                    wait.start,
                ),
            )
        return tuple(requests.values())

    def _priority(self, wait: Wait) -> int:
        workload = self._state.workloads.get(wait.workload)
        return wait.priority if workload is None else workload.priority


def waits_by_name(view: NodeView, waits: list[Wait]) -> Mapping[str, Wait]:
    """Return the oldest wait of each name."""
    found: dict[str, Wait] = {}
    for wait in waits:
        found.setdefault(view.name(wait), wait)
    return found
