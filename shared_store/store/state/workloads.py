"""Workloads: their names, states, private bytes and grants, and those that wait for memory. Data with rules, no I/O.

A workload is an engine with all its processes. One client speaks for it; when that connection ends, the workload is
gone, in every state. The others belong to it by the id in their identity, if they have the speaker's uid.

What a workload says about itself is the truth, whatever the store expected: after a restart, or when a client returned
by itself, the store learns the states. Only waits and grants are the store's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shared_store.base.errors import ProtocolError, WorkloadNotFoundError
from shared_store.base.workload_states import WorkloadState
from shared_store.store.state.clients import Client
from shared_store.store.state.overcommit_counts import OvercommitCounts

AWAY: Final = frozenset({WorkloadState.SWAPPED, WorkloadState.CHECKPOINTED})
"""States in which a workload has only what stays."""

GOING: Final = frozenset({WorkloadState.DRAINING, WorkloadState.LEAVING})
"""States between ``resident`` and ``swapped``."""

STILL: Final = frozenset({WorkloadState.RESIDENT, WorkloadState.DRAINING})
"""States in which a workload has not begun to leave."""


@dataclass(frozen=True)
class Report:
    """The state and memory of a workload, as its speaker reports them.

    Attributes:
        state: where its memory is.
        private: bytes that it has on each device now.
        stays: those of them that a swap does not free.
        needs: private bytes that it has when it is resident.
        refusal: why it must not be swapped out; empty if it may be.
        moved: bytes that the change copied between device and host.
        steps: seconds that the parts of the change took, by name.
        deep: its processes may be taken off their GPU.
    """

    state: WorkloadState
    private: Mapping[str, int] = field(default_factory=dict)
    stays: Mapping[str, int] = field(default_factory=dict)
    needs: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""
    moved: int = 0
    steps: Mapping[str, float] = field(default_factory=dict)
    deep: bool = False


@dataclass
class Grant:
    """Memory that a workload may allocate. It counts in full until it is used.

    Attributes:
        nbytes: granted by device, private bytes and segments together.
        private: private bytes that the workload had when it was granted.
        published: device and bytes of segments that its clients promised to fill since, by token of their plan.
    """

    nbytes: dict[str, int]
    private: dict[str, int]
    published: dict[str, tuple[str, int]] = field(default_factory=dict)

    def left(self, device: str, private: int) -> int:
        """Return the bytes that are granted and not used yet. ``private``: bytes that the workload has now."""
        grown = max(0, private - self.private.get(device, 0))
        published = sum(nbytes for where, nbytes in self.published.values() if where == device)
        return max(0, self.nbytes.get(device, 0) - grown - published)


@dataclass
class Wait:
    """A client's wait for memory.

    Attributes:
        since: monotonic seconds at which it began.
        priority: of the client, 0 (highest) to 4.
        needs: bytes to allocate on each device, without segments that have to return.
        workload: id of the workload that waits; empty for a client that is none.
        client: name of the client that waits, where it is no workload.
        start: the workload waits for its first memory.
        publishes: the client is about to promise segments; what they need is all in ``needs``.
        blocked_by: names of those that have the memory.
        text: why it waits, for people.
    """

    since: float
    priority: int
    needs: Mapping[str, int]
    workload: str = ""
    client: str = ""
    start: bool = False
    publishes: bool = False
    blocked_by: tuple[str, ...] = ()
    text: str = ""


@dataclass
class Workload:
    """One workload.

    Attributes:
        id: that its clients have in ``Identity.member_of``.
        client: number of the client that speaks for it.
        uid: of its processes.
        name: unique in the store.
        kind: of engine.
        priority: 0 (highest) to 4.
        state: as it reports it.
        private: bytes that it has on each device.
        stays: those of them that a swap does not free.
        needs: private bytes that it has when it is resident.
        refusal: why it must not be swapped out; empty if it may be.
        starting: it was never resident.
        asked: the store asked it to leave, and it has neither left nor declined.
        grant: memory that it may allocate.
        joined: monotonic seconds.
        since: monotonic seconds at which it took up its state.
        resident_since: monotonic seconds at which it became resident last; None: never, or it is away.
        spared_until: monotonic seconds until which it is not asked again to leave, because it declined.
        taken_at: monotonic seconds at which it was last asked to leave for others; None: never.
        swaps: how often it left.
        refusals: how often it declined to leave, or did not answer.
        starved_s: seconds that its ended waits for memory lasted.
        out_s: seconds that its last way out took; 0: unknown.
        in_s: seconds that its last way back took; 0: unknown.
        deep: its processes may be taken off their GPU.
        off: private bytes that it has again once the driver brings it back; None: it is not off the GPU.
        share: percent of its devices' time among workloads of its priority; 0: an equal part.
        exclusive: no other workload may use its devices.
    """

    id: str
    client: int
    uid: int
    name: str
    kind: str
    priority: int
    state: WorkloadState
    joined: float
    since: float
    private: dict[str, int] = field(default_factory=dict)
    stays: dict[str, int] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    starting: bool = False
    asked: bool = False
    grant: Grant | None = None
    resident_since: float | None = None
    spared_until: float = 0.0
    taken_at: float | None = None
    swaps: int = 0
    refusals: int = 0
    starved_s: float = 0.0
    out_s: float = 0.0
    in_s: float = 0.0
    deep: bool = False
    off: dict[str, int] | None = None
    share: float = 0.0
    exclusive: bool = False

    @property
    def cost_s(self) -> float:
        """Seconds of its last way out and its last way back; 0: unknown."""
        return self.out_s + self.in_s

    def leaves(self, device: str) -> int:
        """Return the private bytes that it would free on a device."""
        return max(0, self.private.get(device, 0) - self.stays.get(device, 0))

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that it has memory on, or needs it."""
        return tuple(dict.fromkeys((*self.private, *self.needs, *(self.grant.nbytes if self.grant else ()))))


class Workloads:
    """The workloads of a store, and the waits for memory."""

    def __init__(
        self, max_priority: Mapping[int, int] | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """``max_priority``: the lowest number that a user id may claim. ``monotonic`` returns monotonic seconds."""
        self._max_priority = dict(max_priority or {})
        self._now = monotonic
        self._workloads: dict[str, Workload] = {}
        self.counts = OvercommitCounts()
        self.waits: list[Wait] = []
        """In order of arrival."""
        self.reserved: list[Wait] = []
        """Waits of publishers that were granted, until their segments are promised."""

    # Questions.

    def all(self) -> list[Workload]:
        """Return every workload, in the order in which they joined."""
        return list(self._workloads.values())

    def get(self, number: str) -> Workload | None:
        """Return the workload with this id."""
        return self._workloads.get(number)

    def named(self, name: str) -> Workload:
        """Return the workload with this name. Raises :class:`WorkloadNotFoundError`, which lists the names."""
        found = next((one for one in self._workloads.values() if one.name == name), None)
        if found is None:
            names = ", ".join(sorted(one.name for one in self._workloads.values()))
            raise WorkloadNotFoundError(f"no workload {name!r}; there are: {names or 'none'}")
        return found

    def spoken_for(self, client: int) -> list[Workload]:
        """Return the workloads that a client speaks for."""
        return [one for one in self._workloads.values() if one.client == client]

    def of(self, client: Client) -> Workload | None:
        """Return the workload that a client belongs to."""
        found = self._workloads.get(client.identity.member_of)
        return found if found is not None and found.uid == client.uid else None

    def by(self, client: Client, number: str) -> Workload:
        """Return the workload with this id, which a client must speak for. Raises :class:`WorkloadNotFoundError`."""
        found = self._workloads.get(number)
        if found is None or found.client != client.number:
            raise WorkloadNotFoundError("this client speaks for no workload with this id: it has to join first")
        return found

    def private(self, device: str) -> int:
        """Return the private bytes of all workloads on a device."""
        return sum(one.private.get(device, 0) for one in self._workloads.values())

    def granted(self, device: str) -> int:
        """Return the bytes of a device that are granted and not used yet."""
        granted = sum(self.grant_left(one, device) for one in self._workloads.values())
        return granted + sum(wait.needs.get(device, 0) for wait in self.reserved)

    @staticmethod
    def grant_left(workload: Workload, device: str) -> int:
        """Return the bytes of a device that a workload was granted and does not use yet."""
        grant = workload.grant
        return 0 if grant is None else grant.left(device, workload.private.get(device, 0))

    def waits_for_room(self, workload: str) -> bool:
        """Whether a workload waits to be granted memory; one that only publishes segments does not."""
        return any(wait.workload == workload and not wait.publishes for wait in self.waits)

    def wait_of(self, workload: str) -> Wait | None:
        """Return the oldest wait of a workload."""
        return next((wait for wait in self.waits if wait.workload == workload), None)

    # Changes.

    def join(self, client: Client, number: str, name: str, report: Report, *, starting: bool) -> Workload:
        """Add a workload, or take over what its client says now.

        Args:
            client: the client that speaks for it.
            number: its id.
            name: that it would like to have.
            report: its state and memory.
            starting: it was never resident.

        Raises:
            ProtocolError: there is no id, the client belongs to another workload, or another client speaks for it.
        """
        identity = client.identity
        if not number or (identity.member_of and identity.member_of != number):
            raise ProtocolError("a workload's id is that of its client's identity")
        before = self._workloads.get(number)
        if before is not None and before.client != client.number:
            raise ProtocolError(f"another client speaks for {before.name}")
        if before is not None:
            self.report(before, report)
            return before
        now = self._now()
        workload = Workload(
            number,
            client.number,
            client.uid,
            self._unique(name or identity.kind),
            identity.kind,
            self.allowed_priority(client.uid, identity.priority),
            report.state,
            joined=now,
            since=now,
            starting=starting and report.state is not WorkloadState.RESIDENT,
            share=identity.share,
            exclusive=identity.exclusive,
        )
        if report.state is WorkloadState.RESIDENT or report.state in GOING:
            workload.resident_since = now
        self._take(workload, report)
        self._own_grant(workload)
        self._workloads[number] = workload
        return workload

    def allowed_priority(self, uid: int, priority: int) -> int:
        """Return the priority that a user's workload gets: the one that it claims, or the highest that it may."""
        return max(priority, self._max_priority.get(uid, 0))

    def report(self, workload: Workload, report: Report) -> WorkloadState:
        """Take over a report; return the state before it.

        A grant ends when the workload is resident, or away again.
        """
        if report.state is not WorkloadState.SWAPPED:
            self.bring_back(workload)  # it runs
        before, now = workload.state, self._now()
        self._take(workload, report)
        if report.state is before or (workload.off is not None and report.state is WorkloadState.SWAPPED):
            return before
        workload.state, workload.since = report.state, now
        took = sum(report.steps.values())
        if report.state is WorkloadState.RESIDENT:
            workload.resident_since = workload.resident_since if before in GOING else now
            workload.in_s = workload.in_s if before in GOING else took
            if before not in GOING and not workload.starting:
                self.counts.swapped("in", report.moved, report.steps)
            workload.starting, workload.grant = False, None
        elif report.state in AWAY:
            if before in {WorkloadState.RESIDENT, *GOING}:
                workload.swaps += 1
                workload.out_s = took
                self.counts.swapped("out", report.moved, report.steps)
            workload.grant, workload.resident_since = None, None
        else:
            self._own_grant(workload)
        if report.state not in {WorkloadState.RESIDENT, *GOING}:
            workload.asked = False
        return before

    def lost(self, client: int) -> list[Workload]:
        """Remove the workloads that a client spoke for; return them. Their waits and grants end."""
        gone = self.spoken_for(client)
        for workload in gone:
            self.drop(workload)
        return gone

    def drop(self, workload: Workload) -> None:
        """Remove a workload. Its waits and its grant end. Idempotent."""
        if self._workloads.get(workload.id) is workload:
            del self._workloads[workload.id]
            for wait in [wait for wait in self.waits if wait.workload == workload.id]:
                self.end_wait(wait)

    def wait(self, wait: Wait) -> None:
        """Add a wait."""
        self.waits.append(wait)

    def end_wait(self, wait: Wait) -> None:
        """Remove a wait, granted or not. Idempotent."""
        if wait in self.reserved:
            self.reserved.remove(wait)
        if wait in self.waits:
            self.waits.remove(wait)
            self.counts.waited(wait.priority, max(0.0, self._now() - wait.since))
            workload = self._workloads.get(wait.workload)
            if workload is not None:
                workload.starved_s += max(0.0, self._now() - wait.since)

    def reserve(self, wait: Wait) -> None:
        """Grant a publisher memory: it is reserved until :meth:`end_wait`."""
        self.end_wait(wait)
        self.reserved.append(wait)

    def grant(self, workload: Workload, nbytes: Mapping[str, int]) -> None:
        """Grant a workload memory, by device: it returns."""
        workload.grant = Grant(dict(nbytes), dict(workload.private))
        workload.state, workload.since = WorkloadState.RETURNING, self._now()

    @staticmethod
    def _own_grant(workload: Workload) -> None:
        """Count what a workload still needs that returns by the grant of another store, or by itself."""
        if workload.state is WorkloadState.RETURNING and workload.grant is None:
            private = workload.private
            needs = {device: max(0, nbytes - private.get(device, 0)) for device, nbytes in workload.needs.items()}
            workload.grant = Grant(needs, dict(private))

    def end_grant(self, workload: Workload) -> None:
        """Take back what a workload was granted and did not use: it asks anew. Idempotent."""
        if workload.grant is not None:
            workload.grant = None
            workload.state = WorkloadState.SWAPPED if workload.off is None else WorkloadState.CHECKPOINTED
            workload.since = self._now()

    def take_off(self, workload: Workload) -> None:
        """Record that the driver took a swapped workload off its GPU: it has no memory there."""
        if workload.off is None:
            workload.off, workload.private = workload.private, dict.fromkeys(workload.private, 0)
            if (grant := workload.grant) is not None:  # it was granted memory meanwhile: it returns at once
                for device, nbytes in workload.off.items():
                    grant.nbytes[device] = grant.nbytes.get(device, 0) + nbytes
                grant.private = dict(workload.private)
                return
            workload.state, workload.since = WorkloadState.CHECKPOINTED, self._now()

    def bring_back(self, workload: Workload) -> None:
        """Record that the driver brought a workload back: it is swapped, or returns if it was granted memory."""
        if workload.off is not None:
            workload.private, workload.off = workload.off, None
            if workload.state is WorkloadState.CHECKPOINTED:
                workload.state, workload.since = WorkloadState.SWAPPED, self._now()

    def published(self, client: Client, token: str, device: str, nbytes: int) -> None:
        """Record that a client plans to fill segments: they use the grant of its workload, if there is one."""
        workload = self.of(client)
        if workload is not None and workload.grant is not None:
            workload.grant.published[token] = (device, nbytes)

    def unpublished(self, token: str) -> None:
        """Record that a plan was dropped: its segments use no grant any more."""
        for workload in self._workloads.values():
            if workload.grant is not None:
                workload.grant.published.pop(token, None)

    def taken(self, workload: Workload) -> None:
        """Record that a workload is asked to leave for others."""
        workload.asked, workload.taken_at = True, self._now()

    def declined(self, workload: Workload, code: str, spared_s: float) -> None:
        """Record that a workload declined, or did not answer. It is not asked again for ``spared_s`` seconds."""
        self.counts.refused(code)
        workload.asked = False
        workload.refusals += 1
        workload.spared_until = self._now() + spared_s

    def _take(self, workload: Workload, report: Report) -> None:
        """Replace the memory of a workload."""
        if workload.off is None:
            workload.private = dict(report.private)
        else:
            workload.off = dict(report.private)
        workload.deep = report.deep
        workload.stays = {device: min(nbytes, report.private.get(device, 0)) for device, nbytes in report.stays.items()}
        workload.needs = dict(report.needs)
        workload.refusal = report.refusal

    def _unique(self, name: str) -> str:
        """Return a name that no workload has."""
        taken = {one.name for one in self._workloads.values()}
        number, found = 1, name
        while found in taken:
            number += 1
            found = f"{name}-{number}"
        return found
