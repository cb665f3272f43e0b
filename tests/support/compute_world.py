"""Workloads that make steps on devices in simulated time, and an arbiter that decides. No process, no page, no clock.

A device computes one step at a time, in slices, as a GPU's driver does. A step on several devices ends when all have
done their part. A workload says what it does as a compute page does, rings as its gate does, and hears a bell
``BELL_S`` later; without an arbiter every step begins.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared_store.compute.decision import Decision, History, Kind, Member, Settings, Snapshot, decide
from shared_store.compute.usage import charge

BELL_S = 30e-6
"""From a ring to what it causes: half of a turn through a socket, of which 30 to 60 us were measured."""

SLICE_S, SWITCH_S = 2.35e-3, 0.05e-3
"""A device's slice, and its change from one process to another."""

Decide = Callable[[Snapshot, Settings, float], Decision]
Check = Callable[[Snapshot, Decision, float], None]


@dataclass(slots=True)
class Part:
    """What one device has to do for a step."""

    work: Work
    left: float


@dataclass(slots=True)
class Device:
    """A device: parts of steps in turn, and the workload that it computed for last."""

    queue: deque[Part] = field(default_factory=deque)
    running: bool = False
    last: Work | None = None
    busy_s: float = 0.0


@dataclass(slots=True)
class Work:
    """A workload.

    Attributes:
        number: unique.
        priority: 0 to 4.
        devices: names.
        step: returns seconds of the next step, given the time; None: there is no work.
        ended: called with the time when a step ended.
        share: percent; 0: an equal part.
        gap_s: seconds between two steps in which nothing is in flight.
        gated: may be held.
    """

    number: int
    priority: int
    devices: tuple[str, ...]
    step: Callable[[float], float | None]
    ended: Callable[[float], None] = lambda _: None
    share: float = 0.0
    gap_s: float = 0.0
    gated: bool = True
    working: bool = False
    in_flight: int = 0
    parts: int = 0
    begun: int = 0
    finished: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0
    held_since: float | None = None
    held_s: float = 0.0
    ready_at: float = 0.0
    until: float = float("inf")
    allowed: int = 0
    grant: float | None = None
    seen: tuple[int, int, bool] = (0, 0, False)
    progressed: float = 0.0
    idle_since: float | None = 0.0
    charged_s: float = 0.0
    used_s: float = 0.0
    computed_s: float = 0.0
    stopped: bool = False
    gone: bool = False
    steps: list[float] = field(default_factory=list)

    def may_begin(self, now: float) -> bool:
        """Whether the page lets a step begin."""
        return now < self.until or self.begun < self.allowed

    def busy(self, now: float) -> float:
        """Return seconds with a step in flight."""
        return self.busy_s + (now - self.busy_since if self.in_flight else 0.0)


class World:
    """The devices, the workloads and the arbiter."""

    def __init__(
        self,
        works: Sequence[Work],
        settings: Settings | None = None,
        decide: Decide | None = decide,
        check: Check | None = None,
    ) -> None:
        """Begin at time 0. ``decide`` None: without an arbiter. ``check`` is called after each decision."""
        self.works = {work.number: work for work in works}
        self.devices = {device: Device() for work in works for device in work.devices}
        self.now = 0.0
        self.looks = 0
        self.away_until = 0.0
        self.decision = Decision({})
        self._settings = settings or Settings()
        self._decide = decide
        self._check = check
        self._history = History()
        self._looked_at = 0.0
        self._look_at: float | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for work in works:
            self.at(0.0, lambda work=work: self._go(work))  # type: ignore[misc]  # binds the loop's value
        self._ring()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call something at a time."""
        heapq.heappush(self._events, (max(when, self.now), next(self._order), call))

    def wake(self, number: int) -> None:
        """Let a workload see that it has work, or goes on after a stop."""
        self._go(self.works[number])

    def leave(self, number: int) -> None:
        """End a workload at once, as a killed process."""
        work = self.works[number]
        work.gone = True
        for device in work.devices:
            parts = self.devices[device].queue
            kept = [part for part in parts if part.work is not work or part is parts[0]]
            parts.clear()
            parts.extend(kept)
        self._ring()

    def run(self, seconds: float) -> None:
        """Go on until a time."""
        while self._events and self._events[0][0] <= seconds:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = seconds

    # The workload's side.

    def _go(self, work: Work) -> None:
        """Begin a step, or be held, or be without work."""
        if work.gone or work.stopped or work.in_flight or self.now < work.ready_at:
            return
        if not work.working and not self._next(work):
            return
        if not work.may_begin(self.now):
            if work.held_since is None:
                work.held_since = self.now
                self._ring()
            return
        seconds = work.step(self.now)
        if seconds is None:
            work.working = False
            self._unhold(work)
            self._ring()
            return
        self._unhold(work)
        work.begun += 1
        work.in_flight = 1
        work.busy_since = self.now
        work.parts = len(work.devices)
        for device in work.devices:
            self.devices[device].queue.append(Part(work, seconds))
            self._compute(device)

    def _next(self, work: Work) -> bool:
        work.working = True
        self._ring()
        return True

    def _unhold(self, work: Work) -> None:
        if work.held_since is not None:
            work.held_s += self.now - work.held_since
            work.held_since = None

    def _end(self, work: Work) -> None:
        if work.gone:
            return
        if work.stopped:
            self.at(self.now + 0.01, lambda: self._end(work))
            return
        work.busy_s += self.now - work.busy_since
        work.in_flight = 0
        work.finished += 1
        work.steps.append(self.now)
        work.ended(self.now)
        if not work.may_begin(self.now):
            self._ring()
        work.ready_at = self.now + work.gap_s
        self.at(work.ready_at, lambda: self._go(work))

    # The devices' side.

    def _compute(self, name: str) -> None:
        device = self.devices[name]
        if device.running or not device.queue:
            return
        part = device.queue[0]
        switch = SWITCH_S if device.last not in (None, part.work) else 0.0
        spent = min(part.left, SLICE_S)
        device.running = True
        device.last = part.work
        self.at(self.now + switch + spent, lambda: self._sliced(name, spent))

    def _sliced(self, name: str, spent: float) -> None:
        device = self.devices[name]
        device.running = False
        part = device.queue.popleft()
        part.left -= spent
        device.busy_s += spent
        part.work.computed_s += spent
        if part.left > 1e-12 and not part.work.gone:
            device.queue.append(part)
        else:
            part.work.parts -= 1
            if not part.work.parts:
                self._end(part.work)
        self._compute(name)

    # The arbiter's side.

    def _ring(self) -> None:
        if self._decide is not None:
            self._plan(self.now + BELL_S)

    def _plan(self, when: float) -> None:
        when = max(when, self.away_until)
        if self._look_at is None or when < self._look_at - 1e-12:
            self._look_at = when
            self.at(when, lambda: self._look(when))

    def _look(self, planned: float) -> None:
        if self._look_at != planned or self._decide is None:
            return
        self._look_at = None
        if self.now < self.away_until:
            self._plan(self.away_until)
            return
        self.looks += 1
        self._account()
        snapshot = Snapshot(tuple(self._member(work) for work in self.works.values() if not work.gone), self._history)
        decision = self._decide(snapshot, self._settings, self.now)
        if self._check is not None:
            self._check(snapshot, decision, self.now)
        self._history = decision.history
        self.decision = decision
        for number, permit in decision.permits.items():
            work = self.works[number]
            work.until = {Kind.FREE: float("inf"), Kind.TURN: permit.until}.get(permit.kind, 0.0)
            if permit.kind is Kind.ONE_STEP and work.grant != permit.until:
                work.allowed = work.begun + 1
            elif permit.kind is Kind.HELD:
                work.allowed = 0
            work.grant = permit.until if permit.kind is Kind.ONE_STEP else None
            if work.held_since is not None and work.may_begin(self.now):
                self.at(self.now + BELL_S, lambda work=work: self._go(work))  # type: ignore[misc]  # as above
        if decision.wake_at is not None:
            self._plan(max(decision.wake_at, self.now + 1e-6))

    def _account(self) -> None:
        busy = {}
        for work in self.works.values():
            if not work.gone:
                total = work.busy(self.now)
                busy[work.number] = total - work.charged_s
                work.charged_s = total
        devices = {number: frozenset(self.works[number].devices) for number in busy}
        for number, one in charge(busy, devices, self.now - self._looked_at).items():
            self.works[number].used_s += one.seconds
        self._looked_at = self.now

    def _member(self, work: Work) -> Member:
        state = (work.begun, work.finished, work.working)
        if state != work.seen:
            work.progressed = self.now
            if state[:2] != work.seen[:2] and not work.in_flight:
                work.idle_since = self.now
        work.seen = state
        if work.in_flight:
            work.idle_since = None
        elif work.idle_since is None:
            work.idle_since = self.now
        return Member(
            number=work.number,
            priority=work.priority,
            devices=frozenset(work.devices),
            share=work.share,
            gated=work.gated,
            working=work.working,
            in_flight=work.in_flight,
            progressed=work.progressed,
            idle_since=work.idle_since,
            held_since=work.held_since,
            used_s=work.used_s,
        )
