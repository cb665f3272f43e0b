"""Encode and decode messages. The two unions are all messages of each direction."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shared_store.base.errors import ProtocolError
from shared_store.protocol.messages.activity import GetActivityPage, PageGranted
from shared_store.protocol.messages.admin import GetStatus, Pin, Quarantine, Remove, Shutdown, StatusReply, Upgrade
from shared_store.protocol.messages.compaction import Compact, Compacted, Compacting, Switched
from shared_store.protocol.messages.envelope import VERSION, Message
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
    | Report
    | ReportFallback
    | GetStatus
    | GetActivityPage
    | Remove
    | Pin
    | Compact
    | Compacted
    | Quarantine
    | Shutdown
    | Upgrade
    | Unsupported
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
    | Compacting
    | Switched
    | StatusReply
    | PageGranted
    | Push
)

_M = TypeVar("_M")

_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_from_store: msgspec.msgpack.Decoder[StoreMessage] = msgspec.msgpack.Decoder(StoreMessage)


def encode(message: Message) -> bytes:
    """Return the message as msgpack."""
    return _encoder.encode(message)


def decode_from_client(payload: bytes) -> ClientMessage:
    """Decode a payload on the store's side. Raises :class:`ProtocolError` if it is not a client's message."""
    return _decode(_from_client, payload)


def decode_from_store(payload: bytes) -> StoreMessage:
    """Decode a payload on a client's side. Raises :class:`ProtocolError` if it is not a store's message."""
    return _decode(_from_store, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_M], payload: bytes) -> _M:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol version {VERSION}: {error}") from error
