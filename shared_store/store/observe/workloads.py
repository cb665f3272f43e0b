"""What workloads do, and their status."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared_store.activity.layout import Activity
from shared_store.base.workloads import WorkloadMemory, WorkloadStatus
from shared_store.store.activity_pages import ActivityPages
from shared_store.store.compute.compute import Compute
from shared_store.store.state.clients import Client
from shared_store.store.state.sharing import Sharing, sharing
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import Workload


@dataclass(frozen=True, eq=False)
class WorkloadStatuses:
    """Describes the workloads of a store."""

    _state: StoreState
    _pages: ActivityPages
    _compute: Compute

    def workload_statuses(self, now: float) -> tuple[WorkloadStatus, ...]:
        """Return the status of each workload, in the order in which they joined. ``now``: monotonic seconds."""
        if not self._state.workloads.all():
            return ()  # without them a status takes no time for the use of segments
        used = sharing(self._state)
        return tuple(self._status(workload, used, now) for workload in self._state.workloads.all())

    def activity(self, members: Iterable[Client]) -> Activity | None:
        """Return the activity of all processes of a workload together; None: no process says what it does."""
        found = [page for client in members if (page := self._pages.read(client.number)) is not None]
        if not found:
            return None
        idle = [one.idle_s for one in found if one.idle_s is not None]
        return Activity(
            any(one.busy for one in found),
            min(idle) if idle else None,
            sum(one.running for one in found),
            sum(one.waiting for one in found),
        )

    def _status(self, workload: Workload, used: Sharing, now: float) -> WorkloadStatus:
        workloads = self._state.workloads
        client = self._state.clients[workload.client]
        activity = self.activity(used.members.get(workload.id, ())) or Activity(False, None, 0, 0)
        wait = workloads.wait_of(workload.id)
        waited = 0.0 if wait is None else max(0.0, now - wait.since)
        shared = used.shared(workload)
        return WorkloadStatus(
            workload.name,
            workload.kind,
            client.pid,
            workload.uid,
            workload.priority,
            workload.state.value,
            tuple(
                WorkloadMemory(
                    device,
                    workload.private.get(device, 0),
                    shared.get(device, 0),
                    workload.stays.get(device, 0),
                    workload.needs.get(device, 0),
                )
                for device in dict.fromkeys((*workload.devices, *shared))
            ),
            pid_known=client.pid_known,
            namespace=client.identity.namespace,
            pod=client.identity.pod,
            container=client.identity.container,
            swappable=not workload.refusal,
            refusal=workload.refusal,
            starting=workload.starting,
            busy=activity.busy,
            idle_s=None if activity.busy else activity.idle_s,
            running=activity.running,
            waiting=activity.waiting,
            blocked_by=() if wait is None else wait.blocked_by,
            waits_s=round(waited, 3),
            starved_s=round(workload.starved_s + waited, 3),
            swaps=workload.swaps,
            refusals=workload.refusals,
            models=tuple(used.models.get(workload.id, ())),
            id=workload.id,
            compute=self._compute.status(workload),
        )
