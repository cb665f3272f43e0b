"""States of workloads that share a device: what is on the device, and the transitions between states.

The store, its status, clients and tests use the same table.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class WorkloadState(enum.Enum):
    """Where a workload's memory is."""

    RESIDENT = "resident"
    """All of it is on its devices."""

    DRAINING = "draining"
    """No new step starts; steps in flight end."""

    LEAVING = "leaving"
    """Used private memory is copied to the host; private memory and shared weights are unmapped."""

    SWAPPED = "swapped"
    """It keeps what cannot leave: the device context, kernels, captured graphs. Requests wait."""

    RETURNING = "returning"
    """It was granted memory, and maps and fills it. Rolled back as a whole if the memory cannot be had."""

    CHECKPOINTED = "checkpointed"
    """The driver took the process off its GPU: it keeps nothing there."""


class WorkloadEvent(enum.Enum):
    """A change of a workload."""

    DRAIN = "drain"
    """The workload began to stop at a step boundary."""

    DECLINE = "decline"
    """It goes on instead: it declined, or a step before the first unmapping failed."""

    LEAVE = "leave"
    """All steps ended; it begins to copy and unmap."""

    AWAY = "away"
    """It unmapped everything that can leave."""

    RETURN = "return"
    """It was granted memory, and begins to map."""

    ROLL_BACK = "roll_back"
    """The memory could not be had; what was mapped is unmapped again."""

    BACK = "back"
    """Everything is in place; it may start steps."""

    CHECKPOINT = "checkpoint"
    """The driver's checkpoint is complete."""

    RESTORE = "restore"
    """The driver restored the process, which is swapped again."""


TRANSITIONS: Final[Mapping[tuple[WorkloadState, WorkloadEvent], WorkloadState]] = {
    (WorkloadState.RESIDENT, WorkloadEvent.DRAIN): WorkloadState.DRAINING,
    (WorkloadState.DRAINING, WorkloadEvent.DECLINE): WorkloadState.RESIDENT,
    (WorkloadState.DRAINING, WorkloadEvent.LEAVE): WorkloadState.LEAVING,
    (WorkloadState.LEAVING, WorkloadEvent.DECLINE): WorkloadState.RESIDENT,
    (WorkloadState.LEAVING, WorkloadEvent.AWAY): WorkloadState.SWAPPED,
    (WorkloadState.SWAPPED, WorkloadEvent.RETURN): WorkloadState.RETURNING,
    (WorkloadState.RETURNING, WorkloadEvent.ROLL_BACK): WorkloadState.SWAPPED,
    (WorkloadState.RETURNING, WorkloadEvent.BACK): WorkloadState.RESIDENT,
    (WorkloadState.SWAPPED, WorkloadEvent.CHECKPOINT): WorkloadState.CHECKPOINTED,
    (WorkloadState.CHECKPOINTED, WorkloadEvent.RESTORE): WorkloadState.SWAPPED,
}
"""The next state. Other pairs are errors of the program."""
