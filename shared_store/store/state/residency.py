"""Where the bytes of a segment are: a transition table, and nothing but data.

A segment has one id for life, and up to two copies of its bytes: the device's, which readers map, and its *host copy*,
a segment of a lower tier with the same bytes at the same offsets. The host copy of a GPU's segment is in host memory,
or in a file where host memory is short; that of a segment of host memory is in a file. :data:`TRANSITIONS` lists every
change of its state; :class:`shared_store.store.state.segments.Segments` applies it.

=============  ===================================================================================================
``resident``   In the device's memory. A host copy may exist too. New segments begin here, before they are filled.
``leaving``    The device's memory is being released; the host copy has the bytes.
``host``       In host memory alone.
``disk``       In a file of the swap directory alone.
``returning``  Promised to a publisher again, which allocates and fills it on the device. The lower tier has the bytes.
=============  ===================================================================================================
"""

from __future__ import annotations

import enum
from typing import Final

HOST: Final = "cpu"
"""The device of host memory."""

FILES: Final = "disk"
"""The device of files in the swap directory. Models are never on it, and no client may name it."""


class Residency(enum.Enum):
    """Where a segment's bytes are."""

    RESIDENT = "resident"
    LEAVING = "leaving"
    HOST = "host"
    DISK = "disk"
    RETURNING = "returning"


class Event(enum.Enum):
    """Events in the residency of a segment."""

    LEAVE = "leave"  # all its readers are away
    RELEASED = "released"  # the device's memory is released, and the keeper has let go of it; host memory has the bytes
    FILED = "filed"  # the same, and a file has the bytes
    RETURN = "return"  # a publisher's plan needs it on the device
    FILLED = "filled"  # the publisher committed, and the bytes were verified
    FAILED = "failed"  # the publication ended without a commit
    OFFERED = "offered"  # after a restart, a client gave back the device's memory
    SAVED = "saved"  # host memory was short: a file has the bytes of the host copy, which is dropped


class Action(enum.Enum):
    """Work that a transition requires."""

    RELEASE = "release"  # the device's memory, in this process and in the keeper
    KEEP = "keep"  # nothing: the lower tier has the bytes
    PROMISE = "promise"  # count its bytes against the device's limit; its publisher allocates them
    SHARE = "share"  # readers may map it
    DROP = "drop"  # release the host copy in host memory


TRANSITIONS: dict[tuple[Residency, Event], tuple[Residency, Action]] = {
    (Residency.RESIDENT, Event.LEAVE): (Residency.LEAVING, Action.RELEASE),
    (Residency.LEAVING, Event.RELEASED): (Residency.HOST, Action.KEEP),
    (Residency.LEAVING, Event.FILED): (Residency.DISK, Action.KEEP),
    (Residency.HOST, Event.RETURN): (Residency.RETURNING, Action.PROMISE),
    (Residency.DISK, Event.RETURN): (Residency.RETURNING, Action.PROMISE),
    (Residency.RETURNING, Event.FILLED): (Residency.RESIDENT, Action.SHARE),
    (Residency.RETURNING, Event.FAILED): (Residency.LEAVING, Action.RELEASE),
    (Residency.HOST, Event.OFFERED): (Residency.RESIDENT, Action.SHARE),
    (Residency.DISK, Event.OFFERED): (Residency.RESIDENT, Action.SHARE),
    (Residency.HOST, Event.SAVED): (Residency.DISK, Action.DROP),
}
"""Pairs that are not listed are refused."""

ON_DEVICE = frozenset({Residency.RESIDENT, Residency.LEAVING, Residency.RETURNING})
"""States in which a segment counts against its device's limit."""

BELOW = frozenset({Residency.HOST, Residency.DISK})
"""States in which a lower tier alone has the bytes."""


def resting_place(host_device: str) -> Residency:
    """Return the state of a segment that left its device, by the device of its host copy."""
    return Residency.DISK if host_device == FILES else Residency.HOST
