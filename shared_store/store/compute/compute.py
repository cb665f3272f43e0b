"""Compute by priority, on the store's side: workloads join the arbiter, their priorities and shares follow, they leave.

The arbiter is started when the first workload joins it. When it is lost, all workloads have left it: their clients
notice by themselves, and join the next one. Until that runs, the steps of those that join are free.
"""

from __future__ import annotations

import logging
import socket
from typing import Final, Literal

from shared_store.base.errors import MemoryBackendError
from shared_store.base.status import ArbiterStatus
from shared_store.base.workloads import ComputeStatus
from shared_store.compute import control, support
from shared_store.compute.page import make_page
from shared_store.runtime.fds import OwnedFd, OwnedFds
from shared_store.store.compute.members import Member, Members
from shared_store.store.compute.process import ArbiterProcess
from shared_store.store.signals import Signals
from shared_store.store.state.workloads import Workload, Workloads

log = logging.getLogger(__name__)

NOT_JOINED: Final = "it has not joined the arbiter"
NO_ARBITER: Final = "the arbiter is lost, and is being started again"


class Compute:
    """The workloads of a store at its arbiter."""

    def __init__(self, workloads: Workloads, signals: Signals, max_hold_s: float, *, enabled: bool) -> None:
        """Start nothing yet.

        Args:
            workloads: of the store.
            signals: tell of changes of the state, and hear of a lost arbiter.
            max_hold_s: seconds after which a workload that is held makes one step; 0: it makes none.
            enabled: whether there is an arbiter at all.
        """
        self.enabled = enabled
        self.restarts = 0
        self._workloads = workloads
        self._signals = signals
        self._max_hold_s = max_hold_s
        self._members = Members()
        self._expected = False
        self._lost = False
        self._arbiter = ArbiterProcess(
            control.Rules(max_hold_s),
            started=self._started,
            hear=self._heard,
            lost=self._ended,
            watched=lambda: self._expected,
        )
        signals.observe(on_change=self.follow)

    def join(self, workload: Workload, ungated: str) -> OwnedFds:
        """Let a workload take part, in place of an earlier time; return page and socket for its client.

        Args:
            workload: of this store.
            ungated: why it must never be held; empty: it may be.

        Raises:
            MemoryBackendError: the kernel refuses the page or the sockets.
        """
        with make_page() as page, OwnedFds() as pair:
            try:
                for end in socket.socketpair():
                    pair.add(OwnedFd(end.detach()))
                copy = page.dup()
            except OSError as error:
                raise MemoryBackendError(f"cannot make a socket to the arbiter: {error.strerror or error}") from error
            client, arbiter = pair.detach()
            theirs, ours = OwnedFds([OwnedFd(page.detach()), client]), OwnedFds([copy, arbiter])
        self._leave(workload.id)
        ungated = ungated or _ungated(workload)
        added = control.Add(
            self._members.next_number(),
            workload.devices,
            workload.priority,
            workload.share,
            not ungated,
        )
        member = Member(added, ungated, ours)
        self._members.put(workload.id, member)
        if self._arbiter.running:
            self._pass_on(member)
        else:
            self._arbiter.need()
        return theirs

    def follow(self) -> None:
        """Tell the arbiter which workloads are gone, and which have another priority or share, or other devices."""
        for number in self._members.known():
            if self._workloads.get(number) is None:
                self._tell_gone(self._members.forget(number))
        for number, member in self._members.all():
            workload, added = self._workloads.get(number), member.added
            if workload is None:
                continue
            now = control.Add(added.number, workload.devices, workload.priority, workload.share, added.gated)
            if now == added:
                continue
            member.added = now
            if not len(member.fds):
                self._arbiter.send(control.Change(now.number, now.devices, now.priority, now.share))

    def status(self, workload: Workload) -> ComputeStatus | None:
        """Return what a workload computes; None: there is no arbiter."""
        if not self.enabled:
            return None
        member, used = self._members.get(workload.id), self._members.used(workload.id)
        row = None if member is None else member.row
        gated = member is not None and self._arbiter.running and member.added.gated
        if member is None:
            ungated = NO_ARBITER if self._lost else NOT_JOINED
        else:
            ungated = member.ungated or ("" if gated else NO_ARBITER)
        return ComputeStatus(
            workload.share,
            round(row.used_share, 4) if row is not None else 0.0,
            round(used.device_s, 3),
            round(used.estimated_s, 3),
            round(used.held_s, 3),
            row is not None and row.held and gated,
            row is not None and row.stalled,
            gated,
            ungated,
            workload.exclusive,
        )

    def arbiter_status(self) -> ArbiterStatus | None:
        """Return the status of the arbiter; None: there is none."""
        if not self.enabled:
            return None
        pid = self._arbiter.pid
        state: Literal["ok", "idle", "lost"] = "ok" if pid is not None else "lost" if self._lost else "idle"
        return ArbiterStatus(state, pid or 0, self.restarts, self._max_hold_s)

    async def stop(self) -> None:
        """End the arbiter. All workloads have left it, and cannot join any more."""
        self.enabled = False
        for workload, _ in self._members.all():
            self._members.forget(workload)
        await self._arbiter.stop()

    def _leave(self, workload: str) -> None:
        self._tell_gone(self._members.leave(workload))

    def _tell_gone(self, member: Member | None) -> None:
        """Tell the arbiter that a member left it, unless it never knew."""
        if member is not None:
            self._arbiter.send(control.Drop(member.added.number))

    def _pass_on(self, member: Member) -> None:
        self._expected = True
        self._arbiter.send(member.added, OwnedFds(member.fds.detach()))

    def _started(self) -> None:
        """Tell a new arbiter of those that wait for it."""
        if self._lost:
            self._lost = False
            self.restarts += 1
        for _, member in self._members.all():
            self._pass_on(member)
        self._signals.changed()

    def _heard(self, message: control.ToStore) -> None:
        self._expected = bool(message.rows)
        self._members.report(message.rows)

    def _ended(self, reason: str) -> None:
        """All have left the arbiter that ended. Those that had not reached it wait for the next one."""
        self._lost, self._expected = bool(self._members.known()), False
        for workload, member in self._members.all():
            if not len(member.fds):
                self._members.leave(workload)
        self._signals.event("arbiter_lost", reason=reason)
        self._signals.changed()
        if self._members:
            self._arbiter.need()


def _ungated(workload: Workload) -> str:
    """Return why this version never holds a workload; empty: it does."""
    gpus = any(device.startswith(("GPU-", "MIG-")) for device in workload.devices)
    return support.UNGATED if gpus and not support.GPUS else ""
