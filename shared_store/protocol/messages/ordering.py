"""The order of requests: those of one client about one thing are executed in the order in which they were sent.

Both sides use it. The store begins a request after the earlier ones with its key, and a client sends nothing about a
thing while the answer to a cancelled request about it is under way.
"""

from __future__ import annotations

from shared_store.protocol.messages.compaction import AbandonCompaction, Compact, Compacted
from shared_store.protocol.messages.compute import JoinCompute
from shared_store.protocol.messages.envelope import Request
from shared_store.protocol.messages.session import Acquire, Yield
from shared_store.protocol.messages.workload import Join, ReportWorkload, TakeRoom

Key = tuple[str, str]
"""Kind and name of a thing."""


def order_key(request: Request) -> Key | None:
    """Return what a request is about; None for one that has no order with others.

    Models go by their weight key, as the request spells it; turns by their name. A client has one compaction at a time,
    so those of all devices have one order. Those of a workload go by its id.
    """
    if isinstance(request, Acquire | Yield):
        return ("turn", request.lease)
    if isinstance(request, Compact | Compacted | AbandonCompaction):
        return ("compaction", "")
    if isinstance(request, Join | TakeRoom | ReportWorkload | JoinCompute):
        return ("workload", request.workload)
    key = getattr(request, "key", None)
    return None if key is None else ("model", key)
