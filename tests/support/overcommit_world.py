"""A node in simulated time: workloads with requests, whose moves a policy decides. No process, no memory, no clock.

Requests of one engine run side by side, at full speed each; engines that are busy at the same time get equal shares of
the device's time. A request whose engine is away waits, and keeps what it has computed. All bytes and seconds are the
caller's. Does not model workloads that decline, or moves that fail.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared_store.base.workload_states import WorkloadState
from shared_store.store.residency.policy import (
    Decision,
    DeviceMemory,
    MemoryRequest,
    SegmentView,
    Settings,
    Snapshot,
    WorkloadView,
)

DEVICE = "gpu"
SOON = 1e-9

Decide = Callable[[Snapshot, Settings, float], Decision]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when, at which engine, seconds to its first token and to its end with the device to itself."""

    at: float
    engine: str
    first_s: float
    whole_s: float


@dataclass(slots=True)
class Engine:
    """A workload.

    Attributes:
        name: unique.
        priority: 0 to 4.
        private: bytes that leave with it.
        out_s: seconds in which it leaves.
        in_s: seconds in which it returns if its model is on the device.
        model: name of its model; workloads of one model share its bytes.
        stays: bytes that it always has.
    """

    name: str
    priority: int
    private: int
    out_s: float
    in_s: float
    model: str = ""
    stays: int = 0
    state: WorkloadState = WorkloadState.SWAPPED
    work: float = 0.0
    jobs: list[tuple[float, int, Arrival]] = field(default_factory=list)
    firsts: list[tuple[float, int, Arrival]] = field(default_factory=list)
    asks_since: float | None = None
    idle_since: float = 0.0
    resident_since: float = -math.inf
    taken_at: float = -math.inf
    away_since: float = -math.inf

    @property
    def steps(self) -> bool:
        """Whether it is on its device and has work."""
        return bool(self.jobs) and self.state is WorkloadState.RESIDENT


@dataclass(slots=True)
class Records:
    """What happened.

    Attributes:
        first: seconds from each request's arrival to its first token, by priority.
        unserved: ages of requests that had no first token in the end, by priority.
        stretch: seconds from arrival to end, and seconds alone, of each request.
        waits: seconds that each return waited for its grant, by engine.
        taken: names of victims in order.
        swaps: moves out.
        quick: returns within 10 s after the engine had left.
        stepping_s: seconds in which any engine worked.
        decisions: calls of the policy.
    """

    first: dict[int, list[float]] = field(default_factory=dict)
    unserved: dict[int, list[float]] = field(default_factory=dict)
    stretch: list[tuple[float, float]] = field(default_factory=list)
    waits: dict[str, list[float]] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    swaps: int = 0
    quick: int = 0
    stepping_s: float = 0.0
    decisions: int = 0


class World:
    """One device and its engines.

    Args:
        capacity: bytes of the device.
        engines: all of them, away.
        models: bytes and seconds to load by name of a model.
        decide: the policy.
        settings: its settings.
    """

    def __init__(
        self,
        capacity: int,
        engines: Sequence[Engine],
        models: dict[str, tuple[int, float]],
        decide: Decide,
        settings: Settings,
    ) -> None:
        self.now = 0.0
        self.records = Records()
        self._capacity = capacity - sum(one.stays for one in engines)
        self._engines = {one.name: one for one in engines}
        self._models = models
        self._numbers = {name: number for number, name in enumerate(models)}
        self._decide = decide
        self._settings = settings
        self._moves: list[tuple[float, int, str]] = []
        self._count = 0
        self._wake_at = math.inf
        self._views: dict[str, WorkloadView] = {}
        for engine in engines:
            self._show(engine)

    def run(self, arrivals: Sequence[Arrival], until: float) -> Records:
        """Let requests arrive, in order of time, and return what happened."""
        index = 0
        while True:
            arrives = arrivals[index].at if index < len(arrivals) else math.inf
            moves = self._moves[0][0] if self._moves else math.inf
            ends = self._next_end()
            then = min(arrives, moves, ends, self._wake_at)
            if then > until:
                break
            changed = self._advance(max(then, self.now))
            if then == self._wake_at:
                self._wake_at = math.inf
                changed = True
            while index < len(arrivals) and arrivals[index].at <= self.now:
                changed |= self._arrive(arrivals[index])
                index += 1
            while self._moves and self._moves[0][0] <= self.now:
                self._moved(self._engines[heapq.heappop(self._moves)[2]])
                changed = True
            if changed:
                self._settle()
        self._advance(until)
        for engine in self._engines.values():
            for _, _, job in engine.firsts:
                self.records.unserved.setdefault(engine.priority, []).append(until - job.at)
        return self.records

    def _next_end(self) -> float:
        """Return when the next request has its first token or ends, if nothing else happens."""
        steps = [one for one in self._engines.values() if one.steps]
        nearest = min(
            (min(one.jobs[0][0], one.firsts[0][0] if one.firsts else math.inf) - one.work for one in steps),
            default=math.inf,
        )
        return self.now + max(nearest, SOON) * len(steps) if steps else math.inf

    def _advance(self, then: float) -> bool:
        """Let engines work; return whether one has no more work."""
        passed, self.now = then - self.now, then
        steps = [one for one in self._engines.values() if one.steps]
        self.records.stepping_s += passed if steps else 0.0
        ended = False
        for engine in steps:
            engine.work += passed / len(steps)
            while engine.firsts and engine.firsts[0][0] <= engine.work + SOON:
                job = heapq.heappop(engine.firsts)[2]
                self.records.first.setdefault(engine.priority, []).append(self.now - job.at)
            while engine.jobs and engine.jobs[0][0] <= engine.work + SOON:
                job = heapq.heappop(engine.jobs)[2]
                self.records.stretch.append((self.now - job.at, job.whole_s))
            if not engine.jobs:
                engine.idle_since = self.now
                self._show(engine)
                ended = True
        return ended

    def _arrive(self, arrival: Arrival) -> bool:
        engine = self._engines[arrival.engine]
        was_idle = not engine.jobs
        self._count += 1
        heapq.heappush(engine.jobs, (engine.work + arrival.whole_s, self._count, arrival))
        heapq.heappush(engine.firsts, (engine.work + arrival.first_s, self._count, arrival))
        if was_idle:
            self._show(engine)
        return self._ask(engine)

    def _ask(self, engine: Engine) -> bool:
        """Let an engine with work that is away ask for memory; return whether it began to."""
        if engine.state is not WorkloadState.SWAPPED or not engine.jobs or engine.asks_since is not None:
            return False
        engine.asks_since = self.now
        return True

    def _moved(self, engine: Engine) -> None:
        if engine.state is WorkloadState.LEAVING:
            engine.state, engine.away_since = WorkloadState.SWAPPED, self.now
            self._ask(engine)
        else:
            engine.state, engine.resident_since = WorkloadState.RESIDENT, self.now
            engine.idle_since = self.now
        self._show(engine)

    def _settle(self) -> None:
        """Decide until nothing changes."""
        while requests := self._requests():
            self.records.decisions += 1
            decision = self._decide(
                Snapshot({DEVICE: DeviceMemory(self.free())}, self._views, self._segments(), requests),
                self._settings,
                self.now,
            )
            self._wake_at = math.inf if decision.wake_at is None else decision.wake_at
            for victim in decision.victims:
                self._leave(self._engines[victim.name])
            for grant in decision.grants:
                self._return(self._engines[grant.name])
            if not decision.grants:
                return

    def _leave(self, engine: Engine) -> None:
        assert engine.state is WorkloadState.RESIDENT, f"{engine.name} is {engine.state}"
        engine.state, engine.taken_at = WorkloadState.LEAVING, self.now
        self.records.swaps += 1
        self.records.taken.append(engine.name)
        self._move(engine, engine.out_s)

    def _return(self, engine: Engine) -> None:
        seconds = engine.in_s
        if engine.model and engine.model not in self._present():
            seconds += self._models[engine.model][1]
        engine.state = WorkloadState.RETURNING
        assert self.free() >= 0, "more was granted than is free"
        assert engine.asks_since is not None
        self.records.waits.setdefault(engine.name, []).append(self.now - engine.asks_since)
        self.records.quick += self.now - engine.away_since < 10
        engine.asks_since = None
        self._move(engine, seconds)

    def _move(self, engine: Engine, seconds: float) -> None:
        self._count += 1
        heapq.heappush(self._moves, (self.now + seconds, self._count, engine.name))
        self._show(engine)

    def free(self) -> int:
        """Return the bytes that are not used."""
        private = sum(one.private for one in self._engines.values() if one.state is not WorkloadState.SWAPPED)
        return self._capacity - private - sum(self._models[name][0] for name in self._present())

    def _present(self) -> set[str]:
        """Return the models that an engine on the device has, or that leave with one."""
        there = {one.model for one in self._engines.values() if one.state is not WorkloadState.SWAPPED}
        return there - {""}

    def _segments(self) -> dict[int, SegmentView]:
        readers: dict[str, set[str]] = {}
        for engine in self._engines.values():
            if engine.model and engine.state is not WorkloadState.SWAPPED:
                readers.setdefault(engine.model, set()).add(engine.name)
        return {
            self._numbers[model]: SegmentView(DEVICE, self._models[model][0], frozenset(names))
            for model, names in readers.items()
        }

    def _requests(self) -> tuple[MemoryRequest, ...]:
        asking = [one for one in self._engines.values() if one.asks_since is not None]
        if not asking:
            return ()
        present = self._present()
        return tuple(
            MemoryRequest(
                one.name,
                one.priority,
                {DEVICE: one.private + (self._models[one.model][0] if one.model and one.model not in present else 0)},
                frozenset((self._numbers[one.model],)) if one.model in present else frozenset(),
                since=one.asks_since or 0.0,
            )
            for one in asking
        )

    def _show(self, engine: Engine) -> None:
        self._views[engine.name] = WorkloadView(
            engine.name,
            engine.priority,
            engine.state,
            {DEVICE: engine.private},
            running=int(bool(engine.jobs)),
            idle_since=engine.idle_since,
            resident_since=engine.resident_since,
            swap_s=engine.out_s + engine.in_s,
            taken_at=engine.taken_at,
        )
