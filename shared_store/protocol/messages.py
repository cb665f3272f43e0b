"""Every message, as a msgspec struct. ``docs/protocol.md`` tells the conversations they make up.

A request carries an ``id`` of the client's choosing; its one reply carries the same. Pushes come from the store at any
time, and a client answers one that it does not know with :class:`Unsupported`, so that versions can differ.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shared_store.checkpoint import FileId
from shared_store.errors import ProtocolError
from shared_store.manifest import Blob
from shared_store.status import Status

VERSION = 1
"""Raised when a message changes in a way that the other side could misunderstand."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Anything that is sent."""


# From a client: the greeting, then requests.


class Hello(Message, frozen=True, tag="hello"):
    """First message of a connection. Its form is the same in every protocol version."""

    protocol: int
    name: str
    version: str


class Request(Message, frozen=True):
    """Anything that gets a reply."""

    id: int


class Acquire(Request, frozen=True, tag="acquire"):
    """Wait for a named lease, in the order of asking; :class:`Granted` answers. It ends with the connection."""

    lease: str


class Yield(Request, frozen=True, tag="yield"):
    """Give a named lease to the next in line."""

    lease: str


class RecallFiles(Request, frozen=True, tag="recall_files"):
    """Ask for the digests of files that somebody hashed before."""

    files: tuple[FileId, ...]


class RememberFiles(Request, frozen=True, tag="remember_files"):
    """Tell the digests of files."""

    files: tuple[tuple[FileId, bytes], ...]


class Open(Request, frozen=True, tag="open"):
    """Ask for a model: :class:`Attached` with its segments, or, with ``publish``, :class:`Granted` to publish it.

    While another client publishes, the reply waits for that one to commit or to leave.
    """

    key: str
    name: str
    engine: str
    device: str
    publish: bool


class Plan(Request, frozen=True, tag="plan"):
    """Ask where the model's blobs go; :class:`Planned` answers, with promised segments for the new ones."""

    key: str
    blobs: tuple[Blob, ...]


class Fill(Request, frozen=True, tag="fill"):
    """Ask for the memory of a promised segment, to be written now; :class:`Filled` answers, with its fd.

    One at a time: the publisher frees the originals of what it has copied before it asks for the next.
    """

    key: str
    segment: int


class Commit(Request, frozen=True, tag="commit"):
    """All bytes are in place and nothing is mapped for writing any more; :class:`Attached` answers."""

    key: str
    manifest: bytes


class Abandon(Request, frozen=True, tag="abandon"):
    """Give the right to publish to the next in line; what was written is dropped."""

    key: str
    reason: str


class Leave(Request, frozen=True, tag="leave"):
    """Stop reading a model: nothing of it is mapped any more."""

    key: str


class Report(Request, frozen=True, tag="report"):
    """Tell how many bytes of a model this reader holds privately (small tensors, and pages that it wrote to)."""

    key: str
    private_bytes: int


class ReportFallback(Request, frozen=True, tag="report_fallback"):
    """Tell that a model was loaded the stock way, and why."""

    name: str
    reason: str


class GetStatus(Request, frozen=True, tag="get_status"):
    """Ask for the store's snapshot."""


class Remove(Request, frozen=True, tag="remove"):
    """Drop a model that nobody uses, by its key or an unambiguous beginning of it."""

    key: str


class Shutdown(Request, frozen=True, tag="shutdown"):
    """Ask the store to end. Engines keep what they have mapped."""


class Unsupported(Message, frozen=True, tag="unsupported"):
    """The client's answer to a push that it does not know."""

    push: int


# From the store: the greeting's answer, replies, pushes.


class Welcome(Message, frozen=True, tag="welcome"):
    """The connection stands; ``client`` is its number in the status."""

    protocol: int
    version: str
    pid: int
    client: int


class Reply(Message, frozen=True):
    """The answer to the request of the same ``id``."""

    id: int


class Done(Reply, frozen=True, tag="done"):
    """It was done; ``detail`` where there is something to tell."""

    detail: str = ""


class Failed(Reply, frozen=True, tag="failed"):
    """It was not done. ``code`` is that of a class in :mod:`shared_store.errors`; id 0: the connection as a whole."""

    code: str
    message: str


class Granted(Reply, frozen=True, tag="granted"):
    """The lease, or the right to publish, is this client's."""


class FileDigests(Reply, frozen=True, tag="file_digests"):
    """One digest for each file asked for; empty bytes where none is known."""

    digests: tuple[bytes, ...]


class SegmentInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A segment. Unless it is only ``promised``, its fd comes with the message: one each, in this order."""

    id: int
    nbytes: int
    promised: bool = False


class BlobPlace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a blob lies: index in the message's ``segments``, first byte; in a plan, whether it must be written."""

    segment: int
    offset: int
    new: bool = False


class Planned(Reply, frozen=True, tag="planned"):
    """Places for the plan's blobs, in its order, in segments that exist and in promised ones."""

    places: tuple[BlobPlace, ...]
    segments: tuple[SegmentInfo, ...]


class Filled(Reply, frozen=True, tag="filled"):
    """The segment is allocated; its fd comes with the message, to be mapped for writing until the commit."""


class Attached(Reply, frozen=True, tag="attached"):
    """A committed model: its manifest, and the places of the manifest's blobs in sealed segments."""

    manifest: bytes
    places: tuple[BlobPlace, ...]
    segments: tuple[SegmentInfo, ...]


class StatusReply(Reply, frozen=True, tag="status"):
    """The store's snapshot."""

    status: Status


class Push(Message, frozen=True, tag="push"):
    """News from the store: ``shutdown``, ``waiting`` (``detail`` says for whom); more in later versions."""

    push: int
    kind: str
    detail: str = ""


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
    | Leave
    | Report
    | ReportFallback
    | GetStatus
    | Remove
    | Shutdown
    | Unsupported
)
StoreMessage = Welcome | Done | Failed | Granted | FileDigests | Planned | Filled | Attached | StatusReply | Push

_M = TypeVar("_M")

_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_from_store: msgspec.msgpack.Decoder[StoreMessage] = msgspec.msgpack.Decoder(StoreMessage)


def encode(message: Message) -> bytes:
    """The message's msgpack form."""
    return _encoder.encode(message)


def decode_from_client(payload: bytes) -> ClientMessage:
    """Raises :class:`ProtocolError` when it is not a client's message."""
    return _decode(_from_client, payload)


def decode_from_store(payload: bytes) -> StoreMessage:
    """Raises :class:`ProtocolError` when it is not a store's message."""
    return _decode(_from_store, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_M], payload: bytes) -> _M:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of protocol version {VERSION}: {error}") from error
