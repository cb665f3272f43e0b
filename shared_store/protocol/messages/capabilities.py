"""Capabilities: optional behaviour that either side announces in the greeting, so that the other side may ask for it.

A capability is needed only for behaviour that a peer of the same protocol version may lack. What belongs to protocol 2
itself (requests at once, ``Cancel``, requests of the store, tickets of offers) needs none.
"""

from __future__ import annotations

from shared_store.protocol.messages import activity, checkpoint, compute, residency, workload

ABANDON_COMPACTION = "abandon_compaction"
"""The store accepts :class:`~shared_store.protocol.messages.AbandonCompaction`."""

STORE: tuple[str, ...] = (
    activity.CAPABILITY,
    ABANDON_COMPACTION,
    residency.RESIDENCY,
    workload.WORKLOADS,
    checkpoint.CHECKPOINTS,
    compute.EXCLUSIVE,
    compute.COMPUTE,
)
"""Capabilities of this version's store."""

CLIENT: tuple[str, ...] = ()
"""Capabilities of this version's clients."""


def of_store(*, arbiter: bool) -> tuple[str, ...]:
    """Return the capabilities of a store with or without an arbiter."""
    return tuple(one for one in STORE if arbiter or one != compute.COMPUTE)
