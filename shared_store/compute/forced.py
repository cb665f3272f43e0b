"""Single steps of workloads that more important ones hold. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from shared_store.compute.snapshot import History, Kind, Member, Permit, Settings


@dataclass(frozen=True)
class Steps:
    """What held workloads may do all the same.

    Attributes:
        permits: by number, of those that may begin one step.
        forced: by number: when each was last let make a step.
        wakes: monotonic seconds at which to decide again.
    """

    permits: dict[int, Permit]
    forced: dict[int, float]
    wakes: list[float]


def force(held: Sequence[Member], able: AbstractSet[int], history: History, settings: Settings, now: float) -> Steps:
    """Let workloads make one step each that were held for ``max_hold_s``: one after the other on each device.

    Args:
        held: those that more important ones hold.
        able: numbers of those that make progress.
        history: that the last decision left.
        settings: of the arbiter.
        now: monotonic seconds.
    """
    forced = {number: min(at, now) for number, at in history.forced.items()}
    if not settings.max_hold_s:
        return Steps({}, {}, [])
    permits: dict[int, Permit] = {}
    wakes: list[float] = []
    taken: set[str] = set()
    waiting: list[tuple[float, int, Member]] = []
    for member in held:
        since = None if member.held_since is None else min(member.held_since, now)
        last = forced.get(member.number)
        pending = since is not None and last is not None and since <= last
        if pending and last is not None:
            permits[member.number] = Permit(Kind.ONE_STEP, last)
        elif since is not None:
            due = max(since, since if last is None else last) + settings.max_hold_s
            waiting.append((due, member.number, member))
        if (pending or member.in_flight) and member.number in able:
            taken |= member.devices
    for due, number, member in sorted(waiting):
        if due > now:
            wakes.append(due)
        elif member.in_flight or member.devices.isdisjoint(taken):
            permits[number] = Permit(Kind.ONE_STEP, now)
            forced[number] = now
            taken |= member.devices
    return Steps(permits, forced, wakes)
