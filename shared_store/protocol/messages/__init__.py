"""Messages between clients and the store, as msgspec structs. ``docs/protocol.md`` describes the conversations.

A module has the messages of one subject, requests and replies together. The messages between keeper and store are
:mod:`shared_store.protocol.keeper_messages`.
"""

from shared_store.protocol.messages.activity import GetActivityPage, PageGranted
from shared_store.protocol.messages.admin import GetStatus, Pin, Quarantine, Remove, Shutdown, StatusReply, Upgrade
from shared_store.protocol.messages.codec import (
    ClientMessage,
    StoreMessage,
    decode_from_client,
    decode_from_store,
    encode,
)
from shared_store.protocol.messages.compaction import Compact, Compacted, Compacting, Move, Switched
from shared_store.protocol.messages.envelope import VERSION, Message, Reply, Request
from shared_store.protocol.messages.models import (
    Abandon,
    Attached,
    Commit,
    Fill,
    Filled,
    Leave,
    Offer,
    Open,
    Plan,
    Planned,
    Rejoin,
    Report,
    ReportFallback,
)
from shared_store.protocol.messages.segments import BlobPlace, SegmentInfo
from shared_store.protocol.messages.session import (
    Acquire,
    Done,
    Failed,
    FileDigests,
    Granted,
    Hello,
    Push,
    RecallFiles,
    RememberFiles,
    Unsupported,
    Welcome,
    Yield,
)

__all__ = [
    "VERSION",
    "Abandon",
    "Acquire",
    "Attached",
    "BlobPlace",
    "ClientMessage",
    "Commit",
    "Compact",
    "Compacted",
    "Compacting",
    "Done",
    "Failed",
    "FileDigests",
    "Fill",
    "Filled",
    "GetActivityPage",
    "GetStatus",
    "Granted",
    "Hello",
    "Leave",
    "Message",
    "Move",
    "Offer",
    "Open",
    "PageGranted",
    "Pin",
    "Plan",
    "Planned",
    "Push",
    "Quarantine",
    "RecallFiles",
    "Rejoin",
    "RememberFiles",
    "Remove",
    "Reply",
    "Report",
    "ReportFallback",
    "Request",
    "SegmentInfo",
    "Shutdown",
    "StatusReply",
    "StoreMessage",
    "Switched",
    "Unsupported",
    "Upgrade",
    "Welcome",
    "Yield",
    "decode_from_client",
    "decode_from_store",
    "encode",
]
