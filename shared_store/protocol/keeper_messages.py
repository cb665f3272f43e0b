"""Messages between keeper and store, over a socket pair that both inherit: messages and fds.

The pair is ordered, and state needs no reply: the kernel delivers every byte that ``sendmsg`` accepted, also when the
sender is killed right after the call. Only :class:`Release` is answered, because memory is free when the keeper has
closed its descriptor, and not when the message is on its way. The state changes are also the records of the keeper's
journal, byte for byte.

A store sends :class:`Prepared` once its imports are done. It receives the state (:class:`Hold`, :class:`NoteModel`,
:class:`NoteFiles`) and :class:`Begin`. It then sends :class:`Ready`, every change of the state, and :class:`Alive` at
intervals.

The messages between clients and the store are :mod:`shared_store.protocol.messages`.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shared_store.base.checkpoint import FileId
from shared_store.base.errors import ProtocolError


class KeeperMessage(msgspec.Struct, frozen=True, tag_field="type"):
    """Base class, for both directions."""


class SegmentRecord(msgspec.Struct, frozen=True, array_like=True):
    """A segment: its id, its device, and its size in bytes. Ids are never reused.

    ``host`` is the id of its host copy, which is a segment of its own; 0 without one.
    """

    id: int
    device: str
    nbytes: int
    host: int = 0


class ModelRecord(msgspec.Struct, frozen=True, array_like=True):
    """A committed model: its manifest, and the location (segment id, offset in bytes) of each of the manifest's blobs.

    ``last_used`` is in Unix seconds.
    """

    key: str
    manifest: bytes
    places: tuple[tuple[int, int], ...]
    pinned: bool = False
    last_used: float = 0.0

    @property
    def segments(self) -> frozenset[int]:
        """Return the ids of the segments that have blobs of the model."""
        return frozenset(segment for segment, _ in self.places)


# State, in both directions and in the journal.


class Hold(KeeperMessage, frozen=True, tag="hold"):
    """A segment of a committed model, with its fd, or its new record.

    Without an fd where none was sent before, only the record is known: from a journal, or the segment is in a lower
    tier.
    """

    segment: SegmentRecord


class Release(KeeperMessage, frozen=True, tag="release"):
    """No committed model has blobs in this segment any more.

    ``confirm``: the store waits for :class:`Released`. Keepers of earlier versions send none.
    """

    segment: int
    confirm: bool = False


class Vacate(KeeperMessage, frozen=True, tag="vacate"):
    """This segment left its device: its fd must be closed. Its record stays, and its host copy has the bytes.

    ``confirm``: as in :class:`Release`.
    """

    segment: int
    confirm: bool = False


class NoteModel(KeeperMessage, frozen=True, tag="note_model"):
    """A model was committed, or its record changed."""

    model: ModelRecord


class ForgetModel(KeeperMessage, frozen=True, tag="forget_model"):
    """A model was removed."""

    key: str


class NoteFiles(KeeperMessage, frozen=True, tag="note_files"):
    """Digests of checkpoint files, each with the uid of the client that reported it."""

    files: tuple[tuple[int, FileId, bytes], ...]


StateChange = Hold | Release | Vacate | NoteModel | ForgetModel | NoteFiles


# From the keeper.


class Begin(KeeperMessage, frozen=True, tag="begin"):
    """The state is complete: serve clients. Carries the listening socket and the lock, in this order.

    ``supervised``: a service manager restarts a keeper that died, so the store does not. ``options``: a
    ``ServeOptions`` as JSON. It is not on a command line, which every user of the machine can read.
    """

    keeper: int
    restarts: int
    supervised: bool
    options: str


class JournalState(KeeperMessage, frozen=True, tag="journal_state"):
    """Why the journal on disk is incomplete; empty: it is complete. Every keeper sends it to a store first.

    ``confirms``: the keeper answers :class:`Release` by :class:`Released`.
    """

    reason: str
    confirms: bool = False


class Released(KeeperMessage, frozen=True, tag="released"):
    """The keeper, and its service manager if there is one, have closed their descriptors of this segment."""

    segment: int


class Notice(KeeperMessage, frozen=True, tag="notice"):
    """An event of the keeper, or of an earlier store. The store publishes it."""

    kind: str
    detail: str


class NotUpgraded(KeeperMessage, frozen=True, tag="not_upgraded"):
    """The requested upgrade failed. The store continues."""

    reason: str


# From the store.


class Prepared(KeeperMessage, frozen=True, tag="prepared"):
    """The store's process has done its imports and waits for the state."""

    version: str


class Ready(KeeperMessage, frozen=True, tag="ready"):
    """The store serves clients."""


class Alive(KeeperMessage, frozen=True, tag="alive"):
    """The store's event loop runs."""


class Upgrade(KeeperMessage, frozen=True, tag="upgrade"):
    """Become the keeper of another installation, and start its store.

    ``python`` is the path of the installation's interpreter, ``environment`` its ``PYTHON...`` variables.
    """

    python: str
    environment: dict[str, str]


class Stop(KeeperMessage, frozen=True, tag="stop"):
    """The store stops, and the keeper with it.

    ``requested``: a client asked for it (``wooly stop``), so that not even a service manager shall bring the models
    back. Otherwise the store received a signal, as it does when the service manager restarts the service.
    """

    requested: bool = False


FromKeeper = Hold | NoteModel | NoteFiles | Begin | JournalState | Released | Notice | NotUpgraded
FromStore = Prepared | Ready | Alive | Upgrade | Stop | StateChange

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
_from_keeper: msgspec.msgpack.Decoder[FromKeeper] = msgspec.msgpack.Decoder(FromKeeper)
_from_store: msgspec.msgpack.Decoder[FromStore] = msgspec.msgpack.Decoder(FromStore)
_state: msgspec.msgpack.Decoder[StateChange] = msgspec.msgpack.Decoder(StateChange)


def encode(message: KeeperMessage) -> bytes:
    """Return the message as msgpack."""
    return _encoder.encode(message)


def decode_from_keeper(payload: bytes) -> FromKeeper:
    """Decode a payload on the store's side. Raises :class:`ProtocolError` if it is not a keeper's message."""
    return _decode(_from_keeper, payload)


def decode_from_store(payload: bytes) -> FromStore:
    """Decode a payload on the keeper's side. Raises :class:`ProtocolError` if it is not a store's message."""
    return _decode(_from_store, payload)


def decode_state(payload: bytes) -> StateChange:
    """Decode a record of a journal or handover. Raises :class:`ProtocolError` if it is not a state change."""
    return _decode(_state, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_M], payload: bytes) -> _M:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message between keeper and store: {error}") from error
