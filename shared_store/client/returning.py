"""What a client does with an answer that it no longer waits for: it returns what the answer grants."""

from __future__ import annotations

from collections.abc import Callable

from shared_store.protocol import messages
from shared_store.protocol.messages.capabilities import ABANDON_COMPACTION


def returning(
    request: messages.Request, reply: messages.Reply, next_id: Callable[[], int], capabilities: frozenset[str]
) -> messages.Request | None:
    """Return the request that returns what a late reply grants; None if it grants nothing that lasts.

    Args:
        request: the cancelled request.
        reply: its answer.
        next_id: numbers the new request.
        capabilities: those of the store.
    """
    match request, reply:
        case messages.Acquire(), messages.Granted():
            return messages.Yield(next_id(), request.lease)
        case messages.Open(), messages.Granted():
            return messages.Abandon(next_id(), request.key, "the client stopped waiting before the grant")
        case messages.Open() | messages.Commit(), messages.Attached():
            return messages.Leave(next_id(), request.key)
        case messages.CopyToHost() | messages.AddHostCopies(), messages.HostCopies():
            return messages.ReleaseHostCopies(next_id(), request.key)
        case messages.FillHostCopy(), messages.Filled():
            return messages.ReleaseHostCopies(next_id(), request.key)
        case messages.Compact(), messages.Compacting() if ABANDON_COMPACTION in capabilities:
            return messages.AbandonCompaction(next_id(), reply.target.id)
    return None
