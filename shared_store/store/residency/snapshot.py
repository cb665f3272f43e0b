"""The view of a node on which the policy of overcommit decides, and its decisions.

Immutable values. Sizes are in bytes, times in seconds of one monotonic clock. Devices are ``cpu`` or a GPU's UUID.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared_store.base.workload_states import WorkloadState

NEVER = float("-inf")
"""A time before all others."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Times of a node.

    Attributes:
        idle_after_s: a workload without work for so long leaves for the reserve.
        min_resident_s: an idle workload stays for so long after it returned, and for
            ``MIN_RESIDENT_SWAPS`` times its swap cost at least.
        turn_s: a busy workload stays for so long after it returned, while others of equal priority wait, and for
            ``TURN_SWAPS`` times its swap cost at least.
    """

    idle_after_s: float = 300.0
    min_resident_s: float = 2.0
    turn_s: float = 5.0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device.

    Attributes:
        free: what may be granted now: after the reserve and the unused part of grants. Negative if the reserve is used.
        reclaimable: what the eviction of models that no client reads would add to ``free``.
        budget: what all workloads may use together, the reserve included. Only for texts.
        reserve: kept free. Only for texts.
        foreign: used by processes that are not the store's. Only for texts.
    """

    free: int
    reclaimable: int = 0
    budget: int = 0
    reserve: int = 0
    foreign: int = 0


@dataclass(frozen=True, slots=True)
class WorkloadView:
    """A workload that joined.

    Attributes:
        name: unique.
        priority: 0 (highest) to 4.
        state: where its memory is.
        leaves: private bytes that a swap frees, by device. Without what stays.
        swappable: it may be swapped out.
        refusal: why not. Only for texts.
        running: requests with memory of their own in it, or any other sign of work.
        waiting: requests in its queue. A workload that returned for a request has it here until it runs.
        idle_since: when it last had a request running or waiting. Not read while it has any.
        resident_since: when it last became resident.
        swap_s: measured cost of moving it out and in.
        taken_at: when it was last chosen as a victim; ``NEVER`` if it was not.
        asked: it was asked to leave, and has not declined. As good as ``draining``.
        declined_until: it declined, and is not asked again before.
        starting: it was not resident yet: a start takes long, so no request reserves memory until its end.
    """

    name: str
    priority: int
    state: WorkloadState
    leaves: Mapping[str, int] = field(default_factory=dict)
    swappable: bool = True
    refusal: str = ""
    running: int = 0
    waiting: int = 0
    idle_since: float = NEVER
    resident_since: float = NEVER
    swap_s: float = 0.0
    taken_at: float = NEVER
    asked: bool = False
    declined_until: float = NEVER
    starting: bool = False


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A shared segment on its device.

    Attributes:
        device: where it is.
        nbytes: its size.
        readers: workloads that map it, or were granted memory and will map it. Without those that are away.
        held: it stays anyway: clients that are no workloads map it, it is being written, or it is pinned.
    """

    device: str
    nbytes: int
    readers: frozenset[str] = frozenset()
    held: bool = False


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """A wait for memory.

    Attributes:
        name: the workload that waits, or another client.
        priority: 0 (highest) to 4.
        needs: bytes that it must be granted, all at once, by device: private, and shared segments that it maps and that
            are not on the device.
        maps: segments on a device that it maps. They are not freed for it.
        since: when it began to wait.
        start: the workload starts. It never passes another request.
    """

    name: str
    priority: int
    needs: Mapping[str, int]
    maps: frozenset[int] = frozenset()
    since: float = 0.0
    start: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A node at one moment. ``workloads`` has their names as keys, ``segments`` the segments' ids."""

    devices: Mapping[str, DeviceMemory]
    workloads: Mapping[str, WorkloadView]
    segments: Mapping[int, SegmentView] = field(default_factory=dict)
    requests: tuple[MemoryRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class Grant:
    """Memory for a request, in full.

    Attributes:
        name: of the request.
        reclaim: bytes that the eviction of unread models must free first, by device.
    """

    name: str
    reclaim: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Victim:
    """A workload to swap out.

    Attributes:
        name: of the workload.
        for_request: name of the request that it leaves for; empty if it leaves for the reserve.
        active: it leaves although it has requests. If not, it declines if one arrived meanwhile.
        reason: for people.
    """

    name: str
    for_request: str
    active: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a request goes on waiting.

    Attributes:
        name: of the request.
        blocked_by: names of workloads that have the memory, or that are served first; ``foreign processes`` and
            ``reserve`` too.
        text: for people: what is missing, who has it, what would help.
    """

    name: str
    blocked_by: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Attributes:
        grants: give memory to these, in this order.
        victims: ask these to leave.
        waits: every request that was not granted.
        wake_at: decide again then, even if nothing happens before; None: only after an event.
        reclaim: bytes that the eviction of unread models must free for the reserve, by device.
    """

    grants: tuple[Grant, ...] = ()
    victims: tuple[Victim, ...] = ()
    waits: tuple[Wait, ...] = ()
    wake_at: float | None = None
    reclaim: Mapping[str, int] = field(default_factory=dict)
