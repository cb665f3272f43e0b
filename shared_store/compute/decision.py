"""Which workloads may begin steps: a pure function of a snapshot and a clock.

The rules:

1. A workload is never held for a less important one. Workloads that share no device do not affect each other.
2. A workload is held while one that is more important has work on one of its devices, and is not held for a still more
   important one. After ``max_hold_s`` it makes one step all the same, unless that is 0.
3. Equals that share a device run as they like, unless one of them has a share. Then they take turns: the one that used
   least for its share comes next, on all of its devices at once, for a quantum, which ends early when it has nothing in
   flight. The next one begins when nothing of the one before is in flight, or after ``stall_s``.
4. A workload that could begin a step, or has one in flight, and made no progress for ``stall_s`` counts as without
   work, and loses its turn, until it makes progress. Time in which nothing was decided does not count, so that a clock
   that jumps, or an arbiter that was stopped, makes nobody stall.

An idle workload is held as well while it would be if it had work: it begins no step before the arbiter knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from shared_store.compute import progress
from shared_store.compute.forced import force
from shared_store.compute.snapshot import (
    Credit,
    Decision,
    History,
    Kind,
    Member,
    Permit,
    Settings,
    Snapshot,
    Turn,
    Watched,
)
from shared_store.compute.turns import take_turns

__all__ = [
    "Credit",
    "Decision",
    "History",
    "Kind",
    "Member",
    "Permit",
    "Settings",
    "Snapshot",
    "Turn",
    "Watched",
    "decide",
]


def decide(snapshot: Snapshot, settings: Settings, now: float) -> Decision:
    """Decide which workloads may begin steps. ``now``: monotonic seconds."""
    history = snapshot.history
    watched = progress.watch(snapshot, settings, now)
    able = {number for number, one in watched.items() if not one.stalled}
    permits: dict[int, Permit] = {}
    turns: list[Turn] = []
    owed = {
        member.number: replace(history.credits[member.number], joined=False)
        for member in snapshot.members
        if member.number in history.credits
    }
    wakes: list[float] = []
    held: list[Member] = []
    above: set[str] = set()
    for _, level in groupby(sorted(snapshot.members, key=_priority), key=_priority):
        equals = list(level)
        under = [member for member in equals if member.gated and not above.isdisjoint(member.devices)]
        lower = {member.number for member in under}
        beside = [member for member in equals if member.gated and member.number not in lower]
        outcome = take_turns(
            [member for member in beside if member.number in able],
            [member for member in beside if member.number not in able],
            history,
            settings,
            now,
        )
        permits |= {member.number: Permit(Kind.FREE) for member in equals if not member.gated}
        permits |= outcome.permits
        turns += outcome.turns
        owed |= outcome.credits
        wakes += outcome.wakes
        held += under
        above |= {
            device
            for member in equals
            if member.number in able and member.number not in lower
            for device in member.devices
        }
    steps = force(held, able, history, settings, now)
    permits |= {member.number: Permit(Kind.HELD) for member in held} | steps.permits
    wakes += steps.wakes
    worked = progress.worked(watched, history, settings, now)
    permits, shorts = _shorten(snapshot.members, permits, worked)
    wakes += [when + settings.short_s for when in shorts]
    if any(permits[number].kind is not Kind.FREE for number in watched):
        wakes.append(progress.next_look(watched, settings, now))
    return Decision(
        permits,
        frozenset(watched) - able,
        History(now, tuple(turns), owed, steps.forced, progress.after(watched, snapshot.members, permits), worked),
        min(wakes, default=None),
    )


def _shorten(
    members: Sequence[Member], permits: Mapping[int, Permit], worked: Mapping[int, float]
) -> tuple[dict[int, Permit], list[float]]:
    """Return the permits, with steps short where a more important workload works or did so lately, and since when."""
    found = dict(permits)
    since = []
    busy = [member for member in members if member.number in worked]
    for member in members:
        over = [
            worked[one.number]
            for one in busy
            if one.priority < member.priority and not one.devices.isdisjoint(member.devices)
        ]
        if over:
            found[member.number] = replace(found[member.number], short=True)
            since.append(max(over))
    return found, since


def _priority(member: Member) -> int:
    return member.priority
