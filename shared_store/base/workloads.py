"""The workloads of a store, as ``wooly workloads --json`` prints them. Fields may be added under the same schema name.

All sizes are in bytes, all durations in seconds.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

SCHEMA: Final = "wooly.workloads/1"


class WorkloadMemory(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a workload on one device (``cpu`` or a GPU's UUID).

    ``private``: KV cache, graphs, adapters, activations, as the workload reports them. ``shared``: segments that it
    maps. ``stays``: the part of ``private`` that a swap does not free. ``needs``: private bytes that it has when it is
    resident.
    """

    device: str
    private: int
    shared: int
    stays: int = 0
    needs: int = 0


class ComputeStatus(msgspec.Struct, frozen=True, gc=False):
    """What a workload computes.

    ``share``: percent of its devices' time among workloads of its priority; 0: an equal part of what the others leave.
    ``used_share``: fraction (0 to 1) of its devices' time in the last 10 seconds. ``device_s``: seconds of its devices
    that it used; ``estimated_s``: the part of them in which steps of several workloads overlapped, and its part was
    estimated. ``held_s``: seconds for which it was held; ``held``: it is now. ``stalled``: it has work and makes no
    progress. ``gated`` is false with a reason, ``ungated``: why it is never held. ``exclusive``: no other workload may
    use its devices.
    """

    share: float = 0.0
    used_share: float = 0.0
    device_s: float = 0.0
    estimated_s: float = 0.0
    held_s: float = 0.0
    held: bool = False
    stalled: bool = False
    gated: bool = False
    ungated: str = ""
    exclusive: bool = False


class WorkloadStatus(msgspec.Struct, frozen=True, gc=False):
    """One workload. ``id``: that its processes have in common, see ``Identity.member_of``.

    ``starting``: it waits for memory for its first time, or was granted it. ``swappable`` is false with a ``refusal``:
    why it is never swapped out. ``blocked_by``: names of the workloads (or ``foreign processes``, ``reserve``) that
    have the memory it waits for; empty if it does not wait. ``waits_s``: seconds that its oldest wait for memory
    lasts; 0 without one. ``starved_s``: seconds that it waited so far in all. ``compute``: what it computes; None: this
    store has no arbiter.
    """

    name: str
    kind: str
    pid: int
    uid: int
    priority: int
    state: str
    memory: tuple[WorkloadMemory, ...] = ()
    pid_known: bool = True
    namespace: str = ""
    pod: str = ""
    container: str = ""
    swappable: bool = True
    refusal: str = ""
    starting: bool = False
    busy: bool = False
    idle_s: float | None = None
    running: int = 0
    waiting: int = 0
    blocked_by: tuple[str, ...] = ()
    waits_s: float = 0.0
    starved_s: float = 0.0
    swaps: int = 0
    refusals: int = 0
    models: tuple[str, ...] = ()
    id: str = ""
    compute: ComputeStatus | None = None


class Workloads(msgspec.Struct, frozen=True, kw_only=True):
    """The workloads of a store at one moment."""

    schema: Literal["wooly.workloads/1"] = SCHEMA
    workloads: tuple[WorkloadStatus, ...]
