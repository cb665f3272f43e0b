"""The reasons for a workload's state, in words: ``wooly why``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shared_store.base.sizes import format_size
from shared_store.base.workload_states import WorkloadState
from shared_store.store.observe import holding
from shared_store.store.observe.workloads import WorkloadStatuses
from shared_store.store.residency.node_view import NodeView
from shared_store.store.state.sharing import Sharing, sharing
from shared_store.store.state.store_state import StoreState
from shared_store.store.state.workloads import AWAY, Wait, Workload


@dataclass(frozen=True, eq=False)
class Explanations:
    """Explains the states and waits of workloads.

    Attributes:
        max_hold_s: seconds after which a workload that is held makes one step; 0: it makes none.
    """

    _state: StoreState
    _view: NodeView
    _statuses: WorkloadStatuses
    max_hold_s: float = 0.0

    def of(self, workload: Workload, now: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return lines for people, and the names of those that block a workload."""
        used = sharing(self._state)
        wait = self._state.workloads.wait_of(workload.id)
        lines = [self._head(workload, wait, used, now)]
        if wait is not None:
            lines += wait.text.split("; ") if wait.text else ["the store has not decided about it yet"]
            for device in self._view.needs(wait, used):
                lines += self._device(device, used)
        if workload.refusal:
            lines.append(f"it is never swapped out: {workload.refusal}")
        rows = self._statuses.workload_statuses(now)
        row = next(one for one in rows if one.id == workload.id)
        lines += holding.lines(row, rows, self.max_hold_s)
        lines += [f"{device}: {reason}" for device in workload.devices if (reason := self._refusal(device))]
        blocked_by = tuple(one.name for one in holding.holders(row, rows)) if wait is None else wait.blocked_by
        return tuple(lines), blocked_by

    def _head(self, workload: Workload, wait: Wait | None, used: Sharing, now: float) -> str:
        begin = f"{workload.name} ({workload.kind}, P{workload.priority}) is {workload.state.value}"
        since = f"for {max(0.0, now - workload.since):.1f} s"
        if wait is not None:
            needs = ", ".join(
                f"{format_size(nbytes)} on {device}" for device, nbytes in self._view.needs(wait, used).items()
            )
            what = "to start" if wait.start else "to return"
            return f"{begin} and waits for {needs} {what} for {max(0.0, now - wait.since):.1f} s"
        if workload.state is WorkloadState.RETURNING:
            return f"{begin} {since}: it was granted memory, and has not reported that it is resident"
        if workload.state in AWAY:
            return f"{begin} {since}: no request has arrived"
        if workload.asked:
            return f"{begin} {since}, and was asked to leave"
        return f"{begin} {since}"

    def _device(self, device: str, used: Sharing) -> Iterator[str]:
        """Describe the account of a device, and each workload that has memory there."""
        account = self._state.accounts.account(device)
        budget = "unknown" if account.budget is None else format_size(account.budget)
        free = "unknown" if account.free is None else format_size(max(0, account.free))
        granted = f", {format_size(account.granted)} granted and not used yet" if account.granted else ""
        foreign = f", {format_size(account.taken)} of other processes" if account.taken else ""
        yield (
            f"{device}: {free} free of {budget}, beside the reserve of {format_size(account.reserve)}; "
            f"{format_size(account.private)} private, {format_size(account.segments)} shared{granted}{foreign}"
        )
        for one in self._state.workloads.all():
            private, shared = one.private.get(device, 0), used.shared(one).get(device, 0)
            if private or shared:
                what = f"{format_size(private)} private, {format_size(shared)} shared"
                yield f"  {one.name} (P{one.priority}, {one.state.value}): {what}{self._doing(one, used)}"

    def _doing(self, workload: Workload, used: Sharing) -> str:
        activity = self._statuses.activity(used.members.get(workload.id, ()))
        if activity is None:
            return ""
        if activity.busy or activity.running or activity.waiting:
            return f"; {activity.running} running, {activity.waiting} waiting"
        return "" if activity.idle_s is None else f"; idle for {activity.idle_s:.0f} s"

    def _refusal(self, device: str) -> str:
        return self._state.accounts.refusal(device)
