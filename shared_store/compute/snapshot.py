"""What the arbiter knows of workloads, what it decides, and what a decision leaves for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class Settings:
    """Settings of an arbiter, in seconds.

    Attributes:
        max_hold_s: after which a held workload makes one step; 0: never.
        quantum_s: of a turn among equals.
        idle_s: without anything in flight, after which a turn ends early; half of what was used in it, if that is more.
        stall_s: without progress, after which a workload counts as without work.
        short_s: after the last work of a more important workload, for which steps should be short.
        debt_s: of its devices, the most that a workload can have used too much: what it used before is forgotten.
    """

    max_hold_s: float = 0.0
    quantum_s: float = 0.03
    idle_s: float = 0.005
    stall_s: float = 1.0
    short_s: float = 1.0
    debt_s: float = 1.0


@dataclass(frozen=True)
class Member:
    """A workload. Times are monotonic seconds.

    Attributes:
        number: of the workload.
        priority: 0 (highest) to 4.
        devices: names; a turn is for all of them at once.
        share: percent of the devices' time among equals; 0: an equal part of what the others leave.
        gated: False: it is never held, but counts for the others.
        working: it says that it has work.
        in_flight: batches in flight.
        progressed: time at which a step of it began or ended last, or work began, as far as it was seen.
        idle_since: time since which nothing is in flight; None: something is. A step in between begins it anew.
        held_since: time since which it waits to begin a step; None: it does not.
        used_s: seconds of its devices that it used so far.
    """

    number: int
    priority: int
    devices: frozenset[str]
    share: float = 0.0
    gated: bool = True
    working: bool = False
    in_flight: int = 0
    progressed: float = 0.0
    idle_since: float | None = None
    held_since: float | None = None
    used_s: float = 0.0


@dataclass(frozen=True)
class Turn:
    """The time for which one of several equals with shares computes.

    Attributes:
        number: of the workload.
        until: monotonic seconds before which steps may begin.
        used_s: its :attr:`Member.used_s` when it began to compute without another one in between.
    """

    number: int
    until: float
    used_s: float


@dataclass(frozen=True)
class Credit:
    """What a workload used in relation to its share.

    Attributes:
        used: seconds of its devices, divided by the fraction that was its share at that time.
        used_s: its :attr:`Member.used_s` that is contained.
        joined: it had work, and no more important workload held it.
    """

    used: float
    used_s: float
    joined: bool


@dataclass(frozen=True)
class Watched:
    """Progress of a workload that has work.

    Attributes:
        progressed: its :attr:`Member.progressed`.
        since: monotonic seconds since which a step of it is awaited; None: it was held.
        stalled: none came for ``stall_s``.
    """

    progressed: float
    since: float | None
    stalled: bool


@dataclass(frozen=True)
class History:
    """What a decision leaves for the next one.

    Attributes:
        at: monotonic seconds of the decision; None: there was none.
        turns: of equals with shares.
        credits: by number.
        forced: by number: monotonic seconds at which a held workload was last let make a step.
        watched: by number, of those that have work.
        worked: by number: monotonic seconds up to which it had work and made progress.
    """

    at: float | None = None
    turns: tuple[Turn, ...] = ()
    credits: Mapping[int, Credit] = field(default_factory=dict)
    forced: Mapping[int, float] = field(default_factory=dict)
    watched: Mapping[int, Watched] = field(default_factory=dict)
    worked: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What the arbiter knows: all workloads, and what the last decision left."""

    members: tuple[Member, ...]
    history: History = field(default_factory=History)


class Kind(Enum):
    """Of a permit."""

    FREE = "free"
    HELD = "held"
    TURN = "turn"
    ONE_STEP = "one step"


@dataclass(frozen=True)
class Permit:
    """What a workload may do.

    Attributes:
        kind: begin steps; begin none; begin steps before a time; begin one.
        until: of a turn: monotonic seconds before which steps may begin. Of one step: tells it from the next one.
        short: its steps should be short: a more important workload works, or did within ``short_s``.
    """

    kind: Kind
    until: float = 0.0
    short: bool = False


@dataclass(frozen=True)
class Decision:
    """A decision.

    Attributes:
        permits: by number, of every member.
        stalled: numbers of those that have work and make no progress.
        history: for the next snapshot.
        wake_at: monotonic seconds at which to decide again if nothing happens before; None: never.
    """

    permits: Mapping[int, Permit]
    stalled: frozenset[int] = frozenset()
    history: History = field(default_factory=History)
    wake_at: float | None = None
