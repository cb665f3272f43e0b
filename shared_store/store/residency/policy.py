"""The policy of overcommit: which workloads leave their devices, and which requests are granted memory.

:func:`decide` is a pure function of a snapshot, settings and a clock. It does no I/O and keeps nothing between calls.
The store runs it after every event and at :attr:`Decision.wake_at`; the simulator in ``benchmarks`` runs the same code.
A workload that begins or ends work is an event, too.

Requests are served in the order of priority, then arrival. A grant is never partial. Memory is free, or freed by the
eviction of models that no client reads, or else workloads leave for it, never more than needed:

* only those that may be swapped, are resident, and did not decline a moment ago;
* with less priority than the request: at once;
* with nothing running or waiting: when their least residence is over, which a P0 does not wait for in a P0;
* busy, with the priority of the request, P0 excepted: when their turn is over;
* no P0 while the others would do. Then idle before busy, the busy ones of lowest priority first, those that were idle
  for much longer first, and among comparable ones the one that was taken from longest ago.

A request that will be served as time passes, or once workloads that leave are away, keeps its place: later requests get
nothing that it needs. One that waits for an end of work is passed by others, but never by a start.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from shared_store.base.workload_states import WorkloadState
from shared_store.store.residency.snapshot import (
    Decision,
    DeviceMemory,
    Grant,
    MemoryRequest,
    SegmentView,
    Settings,
    Snapshot,
    Victim,
    Wait,
    WorkloadView,
)
from shared_store.store.residency.waits import explain

__all__ = (
    "Decision",
    "DeviceMemory",
    "Grant",
    "MemoryRequest",
    "SegmentView",
    "Settings",
    "Snapshot",
    "Victim",
    "Wait",
    "WorkloadView",
    "decide",
)

MIN_RESIDENT_SWAPS = 4
"""A least residence is never below so many times the cost of a swap."""

TURN_SWAPS = 10
"""A turn is never below so many times the cost of a swap."""

BAND = 4
"""Idle times within this factor are comparable."""


def decide(snapshot: Snapshot, settings: Settings, now: float) -> Decision:
    """Decide which requests are granted memory, and which workloads leave for the others."""
    decisions = _Decisions(snapshot, settings, now)
    for request in sorted(snapshot.requests, key=lambda one: (one.priority, one.since, one.name)):
        decisions.serve(request)
    reclaim = decisions.keep_reserve()
    return Decision(
        tuple(decisions.grants), tuple(decisions.victims), tuple(decisions.waits), decisions.wake_at, reclaim
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A workload that may leave for a request.

    Attributes:
        name: of the workload.
        at: from when on; infinity: after its return.
        active: also with requests.
        kind: P0, then busy, then of higher priority.
        band: logarithm of the time that it was idle.
        taken_at: when it was last taken from.
        since: idle, or resident, since.
        reason: for people.
    """

    name: str
    at: float
    active: bool
    kind: tuple[bool, bool, int]
    band: int
    taken_at: float
    since: float
    reason: str

    @property
    def order(self) -> tuple[tuple[bool, bool, int], int, float, float, str]:
        """The least of these is taken from first."""
        return self.kind, -self.band, self.taken_at, self.since, self.name

    def wronged_by(self, other: _Candidate) -> bool:
        """Whether it must not be taken from while this other one would do."""
        if other.kind[0] != self.kind[0]:
            return self.kind[0]
        return (other.kind, other.band) == (self.kind, self.band) and other.taken_at < self.taken_at


@dataclass(slots=True)
class _Decisions:
    """Decisions on one snapshot.

    Attributes:
        granted: bytes by device that requests before the present one were granted.
        reserved: bytes by device for which those before it keep their place.
        wanted: segments that those requests map.
        leaving: workloads on their way out.
        kept: requests that keep their place.
        passed: requests that do not.
    """

    snapshot: Snapshot
    settings: Settings
    now: float
    granted: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    kept: list[MemoryRequest] = field(default_factory=list)
    passed: list[MemoryRequest] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    victims: list[Victim] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    wake_at: float | None = None

    def __post_init__(self) -> None:
        self.leaving.update(one.name for one in self.snapshot.workloads.values() if _leaves(one))

    def serve(self, request: MemoryRequest) -> None:
        """Grant a request, or choose workloads that leave for it, or let it wait."""
        ahead = [one.name for one in self.passed if request.start and _meet(one, request)]
        if ahead:
            self._wait(request, ahead, ())
            self.passed.append(request)
            return
        if not self._missing(request, ()):
            self.grants.append(Grant(request.name, self._take(request)))
            return
        candidates = sorted(self._candidates(request), key=_order)
        keeps = not self._missing(request, self.leaving)
        if not keeps:
            chosen = self._choose(request, [one for one in candidates if one.at <= self.now])
            self.leaving.update(one.name for one in chosen)
            self.victims.extend(Victim(one.name, request.name, one.active, one.reason) for one in chosen)
            keeps = bool(chosen) or self._wake(request, candidates)
        self._wait(request, [one.name for one in self.kept if _meet(one, request)], candidates)
        if keeps:
            self._keep(request)
        else:
            self.passed.append(request)

    def keep_reserve(self) -> dict[str, int]:
        """Choose idle workloads that leave where the reserve is used; return the bytes to evict before, by device."""
        used = {device: 0 for device, memory in self.snapshot.devices.items() if memory.free < 0}
        reclaim = {
            device: min(-self.snapshot.devices[device].free, self.snapshot.devices[device].reclaimable)
            for device in used
        }
        request = MemoryRequest("", 0, used)
        self.granted.clear()
        self.reserved.clear()
        if self._missing(request, self.leaving):
            candidates = sorted(self._candidates(request), key=_order)
            ready = [one for one in candidates if one.at <= self.now]
            chosen = self._choose(request, ready) or [one for one in ready if self._frees(one, used)]
            self.leaving.update(one.name for one in chosen)
            self.victims.extend(Victim(one.name, "", one.active, one.reason) for one in chosen)
            if not chosen:
                self._wake_at(min((one.at for one in candidates), default=math.inf))
        return {device: nbytes for device, nbytes in reclaim.items() if nbytes}

    def _missing(self, request: MemoryRequest, gone: Collection[str], *, first: bool = False) -> dict[str, int]:
        """Return the bytes by device that a request lacks once workloads are away; ``first``: none is before it."""
        freed = self._freed(request, gone)
        missing: dict[str, int] = {}
        for device, nbytes in request.needs.items():
            memory = self.snapshot.devices.get(device, DeviceMemory(0))
            there = memory.free + memory.reclaimable + freed.get(device, 0) - self.granted.get(device, 0)
            if not first:
                there -= self.reserved.get(device, 0)
            if there < nbytes and (nbytes or not request.name):
                missing[device] = nbytes - there
        return missing

    def _freed(self, request: MemoryRequest, gone: Collection[str]) -> dict[str, int]:
        """Return the bytes by device that workloads free together: their own, and segments that only they read."""
        freed: dict[str, int] = {}
        if not gone:
            return freed
        for name in gone:
            for device, nbytes in self.snapshot.workloads[name].leaves.items():
                freed[device] = freed.get(device, 0) + nbytes
        for number, segment in self.snapshot.segments.items():
            if number in request.maps or number in self.wanted or segment.held or not segment.readers:
                continue
            if all(name in gone for name in segment.readers):
                freed[segment.device] = freed.get(segment.device, 0) + segment.nbytes
        return freed

    def _frees(self, candidate: _Candidate, devices: Collection[str]) -> bool:
        workload = self.snapshot.workloads[candidate.name]
        return any(workload.leaves.get(device) for device in devices)

    def _take(self, request: MemoryRequest) -> dict[str, int]:
        """Count the needs of a request as granted; return the bytes that eviction must free for them, by device."""
        self.wanted |= request.maps
        reclaim: dict[str, int] = {}
        for device, nbytes in request.needs.items():
            memory = self.snapshot.devices.get(device, DeviceMemory(0))
            before = self.granted.get(device, 0)
            self.granted[device] = before + nbytes
            evicted = max(0, before + nbytes - max(0, memory.free)) - max(0, before - max(0, memory.free))
            if evicted:
                reclaim[device] = evicted + (max(0, -memory.free) if not before else 0)
        return reclaim

    def _keep(self, request: MemoryRequest) -> None:
        """Let a request keep its place: those behind it get nothing that it needs."""
        self.wanted |= request.maps
        self.kept.append(request)
        for device, nbytes in request.needs.items():
            self.reserved[device] = self.reserved.get(device, 0) + nbytes

    def _candidates(self, request: MemoryRequest) -> Iterator[_Candidate]:
        for workload in self.snapshot.workloads.values():
            if workload.name == request.name or workload.name in self.leaving:
                continue
            found = _candidate(workload, request, self.settings, self.now)
            if found is not None:
                yield found

    def _choose(self, request: MemoryRequest, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the candidates that leave for a request, in order; none if all together would not do.

        Those first in order that suffice, less those that are not needed beside the others. A set of candidates that
        free a shared segment together is preferred if it is smaller, and takes from nobody in place of another.
        """
        best = self._least(request, candidates)
        if len(best) < 2:
            return best
        worst = max(one.kind for one in best)
        by_name = {one.name: one for one in candidates if one.kind <= worst}
        for readers in dict.fromkeys(one.readers for one in self.snapshot.segments.values() if not one.held):
            group = readers - self.leaving
            if not group or len(group) >= len(best) or not group <= by_name.keys():
                continue
            others = [one for one in by_name.values() if one.name not in group]
            found = self._least(request, sorted((by_name[name] for name in group), key=_order) + others)
            if found and len(found) < len(best) and self._fair(request, found, candidates):
                best = found
        return sorted(best, key=_order)

    def _least(self, request: MemoryRequest, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the first candidates that suffice, less those that are not needed; the last are spared first."""
        chosen: list[_Candidate] = []
        enough = False
        for candidate in candidates:
            chosen.append(candidate)
            enough = self._suffice(request, chosen)
            if enough:
                break
        if not enough:
            return []
        for candidate in reversed(chosen[:-1]):
            fewer = [one for one in chosen if one is not candidate]
            if self._suffice(request, fewer):
                chosen = fewer
        return chosen

    def _suffice(self, request: MemoryRequest, chosen: Sequence[_Candidate]) -> bool:
        return not self._missing(request, {*self.leaving, *(one.name for one in chosen)})

    def _fair(self, request: MemoryRequest, chosen: Sequence[_Candidate], candidates: Sequence[_Candidate]) -> bool:
        """Whether no candidate is chosen in whose place a comparable one, taken from longer ago, would do."""
        return not any(
            one.wronged_by(other) and self._suffice(request, [other, *(kept for kept in chosen if kept is not one)])
            for one in chosen
            for other in candidates
            if other not in chosen
        )

    def _wake(self, request: MemoryRequest, candidates: Sequence[_Candidate]) -> bool:
        """Whether time or returns, and those before it, are all that a request waits for; if so, wake then."""
        for at in sorted({self.now, *(one.at for one in candidates)}):
            gone = {*self.leaving, *(one.name for one in candidates if one.at <= at)}
            if not self._missing(request, gone, first=True):
                self._wake_at(at)
                return True
        return False

    def _wake_at(self, at: float) -> None:
        if self.now < at < math.inf:
            self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def _wait(self, request: MemoryRequest, ahead: Sequence[str], candidates: Sequence[_Candidate]) -> None:
        self.waits.append(
            explain(
                request,
                self.snapshot,
                self.now,
                missing=self._missing(request, ()),
                ahead=ahead,
                leaving=self.leaving,
                times={one.name: one.at for one in candidates},
            )
        )


def _candidate(workload: WorkloadView, request: MemoryRequest, settings: Settings, now: float) -> _Candidate | None:
    """Return from when on a workload may be taken from for a request; None: not as time passes."""
    returns = workload.state is WorkloadState.RETURNING and not workload.starting
    if not workload.swappable or not (returns or workload.state is WorkloadState.RESIDENT):
        return None
    busy = workload.running > 0 or workload.waiting > 0
    turn = max(settings.turn_s, TURN_SWAPS * workload.swap_s)
    turn_over = workload.resident_since + turn
    stay_over = workload.resident_since + max(settings.min_resident_s, MIN_RESIDENT_SWAPS * workload.swap_s)
    idle_s = now - workload.idle_since
    takes_turns = workload.priority == request.priority > 0
    active = bool(request.name) and (workload.priority > request.priority or (takes_turns and turn_over <= now))
    if busy and not request.name:
        return None
    if not request.name:
        at, reason = workload.idle_since + settings.idle_after_s, f"idle for {idle_s:.0f} s; the reserve is used"
    elif workload.priority > request.priority:
        at, reason = now, f"{request.name} has a higher priority"
    elif busy and takes_turns:
        at, reason = turn_over, f"its turn of {turn:.1f} s is over; {request.name} waits"
    elif busy:
        return None
    else:
        at = now if not workload.priority and not request.priority else stay_over
        reason = f"idle for {idle_s:.1f} s; {request.name} waits"
    idle = max(1.0, min(idle_s, settings.idle_after_s))
    return _Candidate(
        workload.name,
        math.inf if returns else max(at, workload.declined_until),
        active,
        (not workload.priority, busy, -workload.priority if busy else 0),
        0 if busy else int(math.log(idle, BAND)),
        workload.taken_at,
        workload.resident_since if busy else workload.idle_since,
        reason,
    )


def _order(candidate: _Candidate) -> tuple[tuple[bool, bool, int], int, float, float, str]:
    return candidate.order


def _leaves(workload: WorkloadView) -> bool:
    return workload.asked or workload.state in (WorkloadState.DRAINING, WorkloadState.LEAVING)


def _meet(one: MemoryRequest, other: MemoryRequest) -> bool:
    """Whether two requests need memory of the same device."""
    return any(one.needs[device] and other.needs.get(device) for device in one.needs)
