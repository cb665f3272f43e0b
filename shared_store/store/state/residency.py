"""Where the bytes of a segment are: a transition table, and nothing but data.

A segment has one id for life, and up to two copies of its bytes: the device's, which readers map, and its *host copy*,
a segment of host memory with the same bytes at the same offsets. :data:`TRANSITIONS` lists every change of its state;
:class:`shared_store.store.state.segments.Segments` applies it.

=============  ===================================================================================================
``resident``   In the device's memory. A host copy may exist too. New segments begin here, before they are filled.
``leaving``    The device's memory is being released; the host copy has the bytes.
``host``       In host memory alone.
``disk``       In files alone.
``returning``  Promised to a publisher again, which allocates and fills it on the device. The lower tier has the bytes.
=============  ===================================================================================================

Does not promise that every state is reached: no part of the store drops a host copy because files have the bytes, so
``disk`` and the events ``saved`` and ``read`` exist in the table alone. A model that is only in files is not in the
store at all (:mod:`shared_store.disk`).
"""

from __future__ import annotations

import enum


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
    RELEASED = "released"  # the device's memory is released, and the keeper has let go of it
    RETURN = "return"  # a publisher's plan needs it on the device
    FILLED = "filled"  # the publisher committed, and the bytes were verified
    FAILED = "failed"  # the publication ended without a commit
    OFFERED = "offered"  # after a restart, a client gave back the device's memory
    SAVED = "saved"  # files have the bytes, and the host copy is dropped
    READ = "read"  # the bytes were read from files into a host copy


class Action(enum.Enum):
    """Work that a transition requires."""

    RELEASE = "release"  # the device's memory, in this process and in the keeper
    KEEP = "keep"  # nothing: the lower tier has the bytes
    PROMISE = "promise"  # count its bytes against the device's limit; its publisher allocates them
    SHARE = "share"  # readers may map it
    DROP = "drop"  # release the host copy
    ADD = "add"  # take over a verified host copy


TRANSITIONS: dict[tuple[Residency, Event], tuple[Residency, Action]] = {
    (Residency.RESIDENT, Event.LEAVE): (Residency.LEAVING, Action.RELEASE),
    (Residency.LEAVING, Event.RELEASED): (Residency.HOST, Action.KEEP),
    (Residency.HOST, Event.RETURN): (Residency.RETURNING, Action.PROMISE),
    (Residency.RETURNING, Event.FILLED): (Residency.RESIDENT, Action.SHARE),
    (Residency.RETURNING, Event.FAILED): (Residency.LEAVING, Action.RELEASE),
    (Residency.HOST, Event.OFFERED): (Residency.RESIDENT, Action.SHARE),
    (Residency.HOST, Event.SAVED): (Residency.DISK, Action.DROP),
    (Residency.DISK, Event.READ): (Residency.HOST, Action.ADD),
}
"""Pairs that are not listed are refused."""

ON_DEVICE = frozenset({Residency.RESIDENT, Residency.LEAVING, Residency.RETURNING})
"""States in which a segment counts against its device's limit."""
