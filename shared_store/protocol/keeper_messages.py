"""What keeper and store say to each other, over a socket pair that both were given: messages and fds, no replies.

The pair is ordered and needs no acknowledgement: what ``sendmsg`` took arrives also when the sender is killed right
after it. The records are those of the keeper's journal too, byte for byte.

The store's side of a conversation: ``Prepared`` once it has imported all it needs, then it is sent the state
(``Hold``, ``NoteModel``, ``NoteFiles``) and ``Begin``; then ``Ready``, changes of the state as they happen, and
``Alive`` at intervals.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shared_store.base.checkpoint import FileId
from shared_store.base.errors import ProtocolError


class ControlMessage(msgspec.Struct, frozen=True, tag_field="type"):
    """Anything that is sent."""


class SegmentRecord(msgspec.Struct, frozen=True, array_like=True):
    """A segment: its id, which no other ever had, its device and its size in bytes."""

    id: int
    device: str
    nbytes: int


class ModelRecord(msgspec.Struct, frozen=True, array_like=True):
    """A committed model: its manifest, and the place (segment id, first byte) of each of the manifest's blobs.

    ``last_used`` is in Unix seconds.
    """

    key: str
    manifest: bytes
    places: tuple[tuple[int, int], ...]
    pinned: bool = False
    last_used: float = 0.0

    @property
    def segments(self) -> frozenset[int]:
        """Ids of the segments that it lies in."""
        return frozenset(segment for segment, _ in self.places)


# State, either way, and in the journal.


class Hold(ControlMessage, frozen=True, tag="hold"):
    """A segment of a committed model, with its fd. Without one: it is known from a journal, and its fd is lost."""

    segment: SegmentRecord


class Release(ControlMessage, frozen=True, tag="release"):
    """A segment is needed no more."""

    segment: int


class NoteModel(ControlMessage, frozen=True, tag="note_model"):
    """A model was committed, or something of its record changed."""

    model: ModelRecord


class ForgetModel(ControlMessage, frozen=True, tag="forget_model"):
    """A model is gone."""

    key: str


class NoteFiles(ControlMessage, frozen=True, tag="note_files"):
    """Digests of checkpoint files, each with the uid of who told it."""

    files: tuple[tuple[int, FileId, bytes], ...]


StateChange = Hold | Release | NoteModel | ForgetModel | NoteFiles


# From the keeper.


class Begin(ControlMessage, frozen=True, tag="begin"):
    """The state is complete: serve. With the listening socket and the lock, in this order.

    ``supervised``: a service manager starts the keeper, should it die; the store does not. ``options``: a
    ``ServeOptions`` as JSON; not on a command line, which everybody could read.
    """

    keeper: int
    restarts: int
    supervised: bool
    options: str


class JournalState(ControlMessage, frozen=True, tag="journal_state"):
    """Whether the journal is whole on its disk; else why not."""

    reason: str


class Notice(ControlMessage, frozen=True, tag="notice"):
    """Something that happened to the keeper or to a store before this one; the store tells it as an event."""

    kind: str
    detail: str


class NotUpgraded(ControlMessage, frozen=True, tag="not_upgraded"):
    """The upgrade that was asked for came to nothing; the store goes on."""

    reason: str


# From the store.


class Prepared(ControlMessage, frozen=True, tag="prepared"):
    """The store's process has imported what it needs, and waits for the state."""

    version: str


class Ready(ControlMessage, frozen=True, tag="ready"):
    """Clients are served."""


class Alive(ControlMessage, frozen=True, tag="alive"):
    """The store's event loop runs."""


class Upgrade(ControlMessage, frozen=True, tag="upgrade"):
    """Become the keeper of another installation (an interpreter, and its ``PYTHON...`` variables), then the store."""

    python: str
    environment: dict[str, str]


class Stop(ControlMessage, frozen=True, tag="stop"):
    """The store was told to end, and the keeper ends with it."""


FromKeeper = Hold | NoteModel | NoteFiles | Begin | JournalState | Notice | NotUpgraded
FromStore = Prepared | Ready | Alive | Upgrade | Stop | StateChange

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
_from_keeper: msgspec.msgpack.Decoder[FromKeeper] = msgspec.msgpack.Decoder(FromKeeper)
_from_store: msgspec.msgpack.Decoder[FromStore] = msgspec.msgpack.Decoder(FromStore)
_state: msgspec.msgpack.Decoder[StateChange] = msgspec.msgpack.Decoder(StateChange)


def encode(message: ControlMessage) -> bytes:
    """The message's msgpack form."""
    return _encoder.encode(message)


def decode_from_keeper(payload: bytes) -> FromKeeper:
    """Raises :class:`ProtocolError` when it is not a keeper's message."""
    return _decode(_from_keeper, payload)


def decode_from_store(payload: bytes) -> FromStore:
    """Raises :class:`ProtocolError` when it is not a store's message."""
    return _decode(_from_store, payload)


def decode_state(payload: bytes) -> StateChange:
    """Raises :class:`ProtocolError` when it is no change of the state."""
    return _decode(_state, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_M], payload: bytes) -> _M:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message between keeper and store: {error}") from error
