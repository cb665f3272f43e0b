"""Turns of equals: who comes next, by what each used for its share. Pure.

A group is workloads of one priority that have work and, directly or through others, have devices in common. If one of
them has a share, at most one at a time computes on each device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shared_store.compute.snapshot import Credit, History, Kind, Member, Permit, Settings, Turn

LEAST_SHARE = 1.0
"""Percent of a workload without a share where the others' shares leave nothing."""


@dataclass
class Outcome:
    """What some equals may do.

    Attributes:
        permits: by number.
        turns: that go on, or begin.
        credits: by number.
        wakes: monotonic seconds at which to decide again.
    """

    permits: dict[int, Permit] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    credits: dict[int, Credit] = field(default_factory=dict)
    wakes: list[float] = field(default_factory=list)


def take_turns(
    able: Sequence[Member], others: Sequence[Member], history: History, settings: Settings, now: float
) -> Outcome:
    """Decide among equals that no more important workload holds.

    Args:
        able: those that have work and make progress.
        others: those without work, or that stalled. They may not begin beside a turn; one that stalled may begin one
            step, to show that it goes on.
        history: that the last decision left.
        settings: of the arbiter.
        now: monotonic seconds.
    """
    outcome = Outcome()
    found = groups(able)
    for group in found:
        outcome.credits |= charge(group, history, settings)
        if len(group) > 1 and _shared(group):
            _choose(group, outcome, history, settings, now)
        else:
            outcome.permits |= {member.number: Permit(Kind.FREE) for member in group}
    for member in others:
        beside = any(_meet(member, one) and (member.share or _shared(group)) for group in found for one in group)
        outcome.permits[member.number] = _beside(member) if beside else Permit(Kind.FREE)
    return outcome


def groups(members: Iterable[Member]) -> list[list[Member]]:
    """Return the groups of some equals."""
    found: list[tuple[set[str], list[Member]]] = []
    for member in members:
        joined = [one for one in found if not one[0].isdisjoint(member.devices)]
        found = [one for one in found if one not in joined]
        devices = set(member.devices).union(*(one[0] for one in joined))
        found.append((devices, [*(each for one in joined for each in one[1]), member]))
    return [one[1] for one in found]


def weights(group: Sequence[Member]) -> dict[int, float]:
    """Return the fraction of the devices' time that each should have. They may be more or less than 1 in all."""
    without = sum(not member.share for member in group)
    left = 100 - sum(member.share for member in group)
    part = max(left / without, LEAST_SHARE) if without else 0.0
    return {member.number: (member.share or part) / 100 for member in group}


def charge(group: Sequence[Member], history: History, settings: Settings) -> dict[int, Credit]:
    """Return what each used for its share.

    One that joins has no claim for the time before. One that used much before owes a second of its devices at most.
    """
    fractions = weights(group)
    used: dict[int, float] = {}
    joined: set[int] = set()
    for member in group:
        if (old := history.credits.get(member.number)) is None:
            continue
        used[member.number] = old.used + max(0.0, member.used_s - old.used_s) / fractions[member.number]
        if old.joined:
            joined.add(member.number)
    base = min((used[number] for number in joined or used), default=0.0)
    for member in group:
        if member.number not in joined:
            used[member.number] = max(used.get(member.number, base), base)
    least = min(used.values())
    return {
        member.number: Credit(
            min(used[member.number], least + settings.debt_s / fractions[member.number]), member.used_s, joined=True
        )
        for member in group
    }


def _choose(group: Sequence[Member], outcome: Outcome, history: History, settings: Settings, now: float) -> None:
    """Let turns go on, and begin others: the one that used least comes next, and reserves its devices until then."""
    by_number = {member.number: member for member in group}
    last = {turn.number: turn for turn in history.turns if turn.number in by_number}
    turns: dict[int, Turn] = {}
    for number, turn in last.items():
        going = replace(turn, until=min(turn.until, now + settings.quantum_s))
        if now < min(going.until, _ends(by_number[number], going, settings)):
            turns[number] = going
    waiting = sorted(
        (
            member
            for member in group
            if member.number not in turns and _wants(member, last.get(member.number), settings, now)
        ),
        key=lambda one: (
            outcome.credits[one.number].used,
            now if one.held_since is None else one.held_since,
            one.number,
        ),
    )
    taken = {device for number in turns for device in by_number[number].devices}
    in_flight: dict[str, set[int]] = {}
    for member in group:
        for device in member.devices if member.in_flight else ():
            in_flight.setdefault(device, set()).add(member.number)
    left = 0
    for member in waiting:
        own = {member.number}
        if member.devices.isdisjoint(taken) and all(in_flight.get(device, own) <= own for device in member.devices):
            before = last.get(member.number)
            used_s = member.used_s if before is None else before.used_s
            turns[member.number] = Turn(member.number, now + settings.quantum_s, used_s)
        else:
            left += 1
        taken |= member.devices
    for number, turn in turns.items():
        outcome.wakes.append(turn.until)
        if left:
            outcome.wakes.append(min(_ends(by_number[number], turn, settings), now + settings.quantum_s / 4))
    outcome.turns += turns.values()
    outcome.permits |= {
        member.number: Permit(Kind.TURN, turns[member.number].until) if member.number in turns else Permit(Kind.HELD)
        for member in group
    }


def _ends(member: Member, turn: Turn, settings: Settings) -> float:
    """Return when a turn ends early, as the workload has nothing in flight."""
    if member.in_flight or member.held_since is not None or member.idle_since is None:
        return turn.until
    return max(member.idle_since, turn.until - settings.quantum_s) + _pause(member, turn, settings)


def _wants(member: Member, last: Turn | None, settings: Settings, now: float) -> bool:
    """Whether it would use a turn: it waits, something is in flight, or was until now."""
    if member.held_since is not None or member.in_flight or member.idle_since is None:
        return True
    return now - member.idle_since < _pause(member, last, settings)


def _pause(member: Member, turn: Turn | None, settings: Settings) -> float:
    """Return for how long a workload may pause between steps: never longer than a quantum."""
    used_s = 0.0 if turn is None else member.used_s - turn.used_s
    return max(settings.idle_s, min(used_s / 2, settings.quantum_s))


def _meet(one: Member, other: Member) -> bool:
    return not one.devices.isdisjoint(other.devices)


def _shared(group: Iterable[Member]) -> bool:
    return any(member.share for member in group)


def _beside(member: Member) -> Permit:
    if member.held_since is not None or (member.working and not member.in_flight):
        return Permit(Kind.ONE_STEP, member.progressed)
    return Permit(Kind.HELD)
