"""Messages between a store and its arbiter, over a socket pair: one message for each packet, with descriptors.

The arbiter ends when the store's end closes. It answers nothing: while it has workloads it reports usage about twice a
second, and once more when it has none. It drops a workload by itself when that closes its socket.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared_store.base.errors import ProtocolError

MAX_PACKET: Final = 1 << 17
"""Longest packet in bytes: a report about more than a thousand workloads."""


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Take up a workload. The packet carries the descriptors of its page and of the arbiter's end of its socket.

    ``share``: percent of the devices' time among equals; 0: an equal part of what is left. ``gated`` false: it is never
    held, but counts for the others.
    """

    number: int
    devices: tuple[str, ...]
    priority: int
    share: float = 0.0
    gated: bool = True


class Change(msgspec.Struct, frozen=True, tag="change"):
    """A workload has another priority or share, or other devices, from here on."""

    number: int
    devices: tuple[str, ...]
    priority: int
    share: float = 0.0


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """A workload is gone."""

    number: int


class Rules(msgspec.Struct, frozen=True, tag="rules"):
    """Settings: the first message. ``max_hold_s``: seconds after which a held workload makes one step; 0: never."""

    max_hold_s: float = 0.0


class Row(msgspec.Struct, frozen=True, array_like=True):
    """What one workload used so far.

    ``device_s``: seconds of its devices that it used; ``estimated_s``: the part of them in which steps of several
    workloads overlapped, and its part was estimated. ``held_s``: seconds for which it was held. ``used_share``:
    fraction of the devices' time in the last 10 seconds. ``held``: it is held now. ``stalled``: it has work and makes
    no progress, so that nobody waits for it.
    """

    number: int
    device_s: float
    estimated_s: float
    held_s: float
    used_share: float
    held: bool
    stalled: bool


class Usage(msgspec.Struct, frozen=True, tag="usage"):
    """What the workloads used."""

    rows: tuple[Row, ...]


ToArbiter = Rules | Add | Change | Drop
ToStore = Usage

_encoder = msgspec.msgpack.Encoder()
_of_store: msgspec.msgpack.Decoder[ToArbiter] = msgspec.msgpack.Decoder(ToArbiter)
_of_arbiter: msgspec.msgpack.Decoder[ToStore] = msgspec.msgpack.Decoder(ToStore)


def encode(message: ToArbiter | ToStore) -> bytes:
    """Return a message as the bytes of a packet, in msgpack."""
    return _encoder.encode(message)


def decode_from_store(packet: bytes) -> ToArbiter:
    """Return the message of a packet of the store. Raises :class:`ProtocolError`."""
    try:
        return _of_store.decode(packet)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"no message to an arbiter: {error}") from error


def decode_from_arbiter(packet: bytes) -> ToStore:
    """Return the message of a packet of the arbiter. Raises :class:`ProtocolError`."""
    try:
        return _of_arbiter.decode(packet)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"no message of an arbiter: {error}") from error
