"""Encode and decode messages. The two unions are all messages of each direction."""

from __future__ import annotations

from typing import Generic, TypeVar, get_args

import msgspec

from shared_store.base.errors import ProtocolError
from shared_store.protocol.messages.activity import GetActivityPage, PageGranted
from shared_store.protocol.messages.admin import GetStatus, Pin, Quarantine, Remove, Shutdown, StatusReply, Upgrade
from shared_store.protocol.messages.checkpoint import Checkpoint, OfferCheckpoints, PrepareCheckpoint, Restore
from shared_store.protocol.messages.compaction import AbandonCompaction, Compact, Compacted, Compacting, Switched
from shared_store.protocol.messages.compute import ComputeJoined, JoinCompute, SetShare
from shared_store.protocol.messages.envelope import VERSION, Accepted, Cancel, Message, Progress
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
    Wanted,
)
from shared_store.protocol.messages.residency import (
    AddHostCopies,
    CopyToHost,
    FillHostCopy,
    GoAway,
    HostCopies,
    ReleaseHostCopies,
)
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
from shared_store.protocol.messages.workload import (
    ExplainWorkload,
    Explanation,
    Join,
    Joined,
    MoveWorkload,
    ReportWorkload,
    RoomTaken,
    SetPriority,
    SwapIn,
    SwapOut,
    TakeRoom,
)

ClientMessage = (
    Hello
    | Acquire
    | Yield
    | RecallFiles
    | RememberFiles
    | Open
    | Plan
    | Fill
    | Commit
    | Abandon
    | Rejoin
    | Offer
    | Leave
    | CopyToHost
    | FillHostCopy
    | AddHostCopies
    | GoAway
    | ReleaseHostCopies
    | Report
    | ReportFallback
    | Join
    | TakeRoom
    | ReportWorkload
    | OfferCheckpoints
    | JoinCompute
    | MoveWorkload
    | SetPriority
    | SetShare
    | ExplainWorkload
    | GetStatus
    | GetActivityPage
    | Remove
    | Pin
    | Compact
    | Compacted
    | AbandonCompaction
    | Quarantine
    | Shutdown
    | Upgrade
    | Unsupported
    | Cancel
    | Accepted
    | Progress
    | Done
    | Failed
)
StoreMessage = (
    Welcome
    | Done
    | Failed
    | Granted
    | FileDigests
    | Planned
    | Filled
    | Attached
    | HostCopies
    | Compacting
    | Switched
    | StatusReply
    | Wanted
    | PageGranted
    | Push
    | Joined
    | RoomTaken
    | ComputeJoined
    | Explanation
    | SwapOut
    | SwapIn
    | PrepareCheckpoint
    | Checkpoint
    | Restore
    | Cancel
    | Progress
)

_M = TypeVar("_M")


class Unknown(msgspec.Struct, frozen=True):
    """A message of a type that this version does not know. ``id`` is 0 where it has none.

    With an id it is a request: its sender is answered ``Failed`` (``unsupported``).
    """

    type: str
    id: int = 0


class _Coder(Generic[_M]):
    """Decodes the messages of one direction."""

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[_M] = msgspec.msgpack.Decoder(union)

    def decode(self, payload: bytes) -> _M | Unknown:
        """Decode a payload. Raises :class:`ProtocolError` if it is not a message."""
        try:
            return self._decoder.decode(payload)
        except msgspec.ValidationError as error:
            found = self._unknown(payload)
            if found is None:
                raise _malformed(error) from error
            return found
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _malformed(error) from error

    def _unknown(self, payload: bytes) -> Unknown | None:
        """Return the head of a message of an unknown type; None if the type is known, or there is none."""
        try:
            found = _head.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return None if found.type in _tags else found


def _malformed(error: Exception) -> ProtocolError:
    return ProtocolError(f"not a message of protocol version {VERSION}: {error}")


_tags = {str(cls.__struct_config__.tag) for union in (ClientMessage, StoreMessage) for cls in get_args(union)}
_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(Unknown)
_from_client: _Coder[ClientMessage] = _Coder(ClientMessage)
_from_store: _Coder[StoreMessage] = _Coder(StoreMessage)


def encode(message: Message) -> bytes:
    """Return the message as msgpack."""
    return _encoder.encode(message)


def decode_from_client(payload: bytes) -> ClientMessage | Unknown:
    """Decode a payload on the store's side. Raises :class:`ProtocolError` if it is malformed."""
    return _from_client.decode(payload)


def decode_from_store(payload: bytes) -> StoreMessage | Unknown:
    """Decode a payload on a client's side. Raises :class:`ProtocolError` if it is malformed."""
    return _from_store.decode(payload)
