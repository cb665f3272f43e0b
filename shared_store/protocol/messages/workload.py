"""Messages about workloads: what joins, which memory it takes and leaves, and what the store asks of it.

A workload is one engine with all its worker processes, or a transformers process. One of its clients speaks for it:
the client that sent :class:`Join`. The others belong to it by ``Identity.member_of`` and their uid.

Only for stores with the capability ``workloads``.
"""

from __future__ import annotations

import msgspec

from shared_store.protocol.messages.envelope import Reply, Request, StoreRequest

WORKLOADS = "workloads"
"""The capability of stores that answer these messages."""


class DeviceBytes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bytes on a device: ``cpu`` or a GPU's UUID."""

    device: str
    nbytes: int


class StepTime(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Seconds of one step of a swap, for example ``drain``, ``copy``, ``unmap``, ``map``, ``weights``."""

    step: str
    seconds: float


class Join(Request, frozen=True, tag="join", omit_defaults=True):
    """Declare a workload, or declare it again to a restarted store. Answered by :class:`Joined`.

    Name, kind, priority, GPUs and pod are those of the client's identity. A workload that starts joins as ``swapped``
    with ``starting``, and sends :class:`TakeRoom` before it allocates.

    ``workload``: the id that its clients have in ``Identity.member_of``. ``state``: a
    :class:`~shared_store.base.workload_states.WorkloadState`. ``private``: bytes that it has on each of its devices
    now; ``stays``: those of them that a swap does not free; ``needs``: bytes that it has when it is resident.
    ``refusal``: why it must never be swapped out; empty if it may be. ``name``: that it has had in a store before this
    one; empty: that of the client's identity. ``deep``: its processes may be taken off their GPU while it is swapped:
    nothing but a return, which takes memory first, calls CUDA in them.
    """

    workload: str
    state: str
    private: tuple[DeviceBytes, ...] = ()
    stays: tuple[DeviceBytes, ...] = ()
    needs: tuple[DeviceBytes, ...] = ()
    refusal: str = ""
    starting: bool = False
    name: str = ""
    deep: bool = False


class Joined(Reply, frozen=True, tag="joined"):
    """The workload's name, unique in this store, and the priority that it has (``--max-priority`` may lower it)."""

    name: str
    priority: int


class TakeRoom(Request, frozen=True, tag="take_room", omit_defaults=True):
    """Wait until this workload may allocate, on all its devices at once and in full. Answered by :class:`RoomTaken`.

    ``needs``: private bytes that it will allocate on each device. The store adds shared segments of its models that
    are not on their device. The grant lasts until the workload reports ``resident`` or ``swapped``, or disconnects.
    While it waits, the store pushes ``room`` with the reason whenever that changes.
    """

    workload: str
    needs: tuple[DeviceBytes, ...]


class RoomTaken(Reply, frozen=True, tag="room_taken"):
    """The workload may allocate. It waited for ``waited_s`` seconds; ``preempted`` names those that left for it."""

    waited_s: float = 0.0
    preempted: tuple[str, ...] = ()


class ReportWorkload(Request, frozen=True, tag="report_workload", omit_defaults=True):
    """Report a workload's state and memory, as in :class:`Join`, after each change. Answered by ``Done``.

    ``moved``: bytes that the change copied between device and host. ``steps``: how long its parts took.
    """

    workload: str
    state: str
    private: tuple[DeviceBytes, ...] = ()
    stays: tuple[DeviceBytes, ...] = ()
    needs: tuple[DeviceBytes, ...] = ()
    refusal: str = ""
    moved: int = 0
    steps: tuple[StepTime, ...] = ()
    deep: bool = False


class SwapOut(StoreRequest, frozen=True, tag="swap_out", omit_defaults=True):
    """Leave the devices: unmap shared weights and move private memory to the host. Answered by ``Done`` once it is.

    A client that cannot or may not answers ``Failed`` (``declined``) with the reason; one without a handler
    ``Failed`` (``unsupported``). ``reason`` is for people. The store withdraws the request after ``within_s`` seconds;
    0: it waits. Unless ``active``, a workload with running or waiting requests declines.
    """

    reason: str
    within_s: float = 0.0
    active: bool = False


class SwapIn(StoreRequest, frozen=True, tag="swap_in", omit_defaults=True):
    """Return to the devices as if a request had arrived. Answered by :class:`Done` once the workload is resident."""

    reason: str = ""


class MoveWorkload(Request, frozen=True, tag="move_workload"):
    """Swap a workload out, or in, by its name. Answered by ``Done``: with ``wait`` once it is, else at once."""

    name: str
    out: bool
    wait: bool = True


class SetPriority(Request, frozen=True, tag="set_priority"):
    """Set a workload's priority, 0 (highest) to 4, by its name. Answered by ``Done``."""

    name: str
    priority: int


class ExplainWorkload(Request, frozen=True, tag="explain_workload"):
    """Ask why a workload is where it is. Answered by :class:`Explanation`."""

    name: str


class Explanation(Reply, frozen=True, tag="explanation"):
    """Lines for people: what the workload waits for, which workloads have how much of it, and what would help."""

    lines: tuple[str, ...]
    blocked_by: tuple[str, ...] = ()
