"""Which workloads that have work make progress. Pure.

A workload is awaited while a step of it is in flight, or could begin. If nothing is seen of it for ``stall_s``, it has
stalled, until a step of it begins or ends. Time in which nobody looked proves nothing: it does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shared_store.compute.snapshot import History, Kind, Member, Permit, Settings, Snapshot, Watched

LOOKS = 4
"""Looks in ``stall_s`` while a workload waits for another one."""

UNSEEN = 0.5
"""A look that comes so much of ``stall_s`` after the last one saw nothing of the time between."""


def watch(snapshot: Snapshot, settings: Settings, now: float) -> dict[int, Watched]:
    """Return the progress of all workloads that have work."""
    history = snapshot.history
    passed = 0.0 if history.at is None else now - history.at
    unseen = passed if passed > UNSEEN * settings.stall_s else 0.0
    return {
        member.number: _watched(member, history.watched.get(member.number), unseen, settings, now)
        for member in snapshot.members
        if member.working or member.in_flight
    }


def _watched(member: Member, old: Watched | None, unseen: float, settings: Settings, now: float) -> Watched:
    if old is None or member.progressed != old.progressed:
        since, stalled = member.progressed, False
    else:
        since, stalled = now if old.since is None else old.since + unseen, old.stalled
    since = min(since, now)
    return Watched(member.progressed, since, stalled or now - since >= settings.stall_s)


def after(
    watched: Mapping[int, Watched], members: tuple[Member, ...], permits: Mapping[int, Permit]
) -> dict[int, Watched]:
    """Return the progress as a decision leaves it: nothing is awaited of workloads that it holds."""
    held = {one.number for one in members if not one.in_flight and permits[one.number].kind is Kind.HELD}
    return {number: replace(one, since=None) if number in held else one for number, one in watched.items()}


def worked(watched: Mapping[int, Watched], history: History, settings: Settings, now: float) -> dict[int, float]:
    """Return up to when each workload worked, as far as that matters for ``short_s``."""
    before = {number for number, one in history.watched.items() if not one.stalled}
    at = {number: min(when, now) for number, when in history.worked.items()}
    at |= dict.fromkeys(before | {number for number, one in watched.items() if not one.stalled}, now)
    return {number: when for number, when in at.items() if now - when < settings.short_s}


def next_look(watched: Mapping[int, Watched], settings: Settings, now: float) -> float:
    """Return when to look again while workloads wait for others."""
    if any(one.stalled for one in watched.values()):
        return now + settings.stall_s / (5 * LOOKS)
    ends = [one.since + settings.stall_s for one in watched.values() if one.since is not None]
    return min([now + settings.stall_s / LOOKS, *ends])
