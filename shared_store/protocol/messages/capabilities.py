"""Capabilities: optional behaviour that either side announces in the greeting, so that the other side may ask for it.

A capability is needed only for behaviour that a peer of the same protocol version may lack. What belongs to protocol 2
itself (requests at once, ``Cancel``, requests of the store, tickets of offers) needs none.
"""

from __future__ import annotations

from shared_store.protocol.messages import activity, checkpoint, residency, workload

ABANDON_COMPACTION = "abandon_compaction"
"""The store accepts :class:`~shared_store.protocol.messages.AbandonCompaction`."""

STORE: tuple[str, ...] = (
    activity.CAPABILITY,
    ABANDON_COMPACTION,
    residency.RESIDENCY,
    workload.WORKLOADS,
    checkpoint.CHECKPOINTS,
)
"""Capabilities of this version's store."""

CLIENT: tuple[str, ...] = ()
"""Capabilities of this version's clients."""
