"""Which workloads may begin steps: a pure function of a snapshot and a clock.

The rules:

1. A workload is never held for a less important one. Workloads that share no device do not affect each other.
2. A workload is held while one that is more important works on one of its devices and is not held itself. After
   ``max_hold_s`` it makes one step all the same, unless that is 0.
3. Equals that share a device run as they like, unless one of them has a share. Then they take turns: the one that used
   least for its share comes next, on all of its devices at once, for a quantum, which ends early when it has nothing in
   flight. The next one begins when nothing of the one before is in flight, or after ``stall_s``.
4. A workload that has work and made no progress for ``stall_s`` counts as without work, and loses its turn, until it
   makes progress. A clock that jumps is a long time without progress, at worst.
"""

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
        idle_s: without anything in flight, after which a turn ends early.
        stall_s: without progress, after which a workload counts as without work.
        short_s: after the last work of a more important workload, for which steps should be short.
    """

    max_hold_s: float = 0.0
    quantum_s: float = 0.03
    idle_s: float = 0.002
    stall_s: float = 1.0
    short_s: float = 1.0


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
        progressed: time at which a step of it began or ended last, work began, or its hold ended.
        idle_since: time since which nothing is in flight; None: something is.
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
        until: monotonic seconds at which its last step may begin.
    """

    number: int
    until: float


@dataclass(frozen=True)
class Snapshot:
    """What the arbiter knows.

    Attributes:
        members: all workloads.
        turns: that the last decision left.
        credits: that the last decision left: by number, what a workload used in relation to its share.
        forced: that the last decision left: when a workload that is held was last let make a step.
    """

    members: tuple[Member, ...]
    turns: tuple[Turn, ...] = ()
    credits: Mapping[int, float] = field(default_factory=dict)
    forced: Mapping[int, float] = field(default_factory=dict)


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
        until: of a turn: monotonic seconds before which steps may begin.
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
        turns: for the next snapshot.
        credits: for the next snapshot.
        forced: for the next snapshot.
        wake_at: monotonic seconds at which to decide again if nothing happens before; None: never.
    """

    permits: Mapping[int, Permit]
    stalled: frozenset[int] = frozenset()
    turns: tuple[Turn, ...] = ()
    credits: Mapping[int, float] = field(default_factory=dict)
    forced: Mapping[int, float] = field(default_factory=dict)
    wake_at: float | None = None


def decide(snapshot: Snapshot, settings: Settings, now: float) -> Decision:
    """Decide which workloads may begin steps. ``now``: monotonic seconds."""
    raise NotImplementedError
