"""Every message, as a msgspec struct. ``docs/protocol.md`` tells the conversations they make up.

A request carries an ``id`` of the client's choosing; its one reply carries the same. Pushes come from the store at any
time, and a client answers one that it does not know with :class:`Unsupported`, so that versions can differ.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shared_store.base.checkpoint import FileId
from shared_store.base.errors import ProtocolError
from shared_store.base.manifest import Blob
from shared_store.base.status import Status

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
    """Wait for a named lease, in the order of asking; :class:`Granted` answers. It ends with the connection.

    Without ``wait`` it is answered at once: a client that had the lease from a store before this one gets in line, and
    goes on with what it began.
    """

    lease: str
    wait: bool = True


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
    """Ask where the model's blobs go; :class:`Planned` answers, with promised segments for the new ones.

    ``wish``: a :class:`BlobPlace` for each blob, in segments of ``sizes`` bytes. What is new then goes there, because
    the client has addresses for it there. Without one the store lays it out.
    """

    key: str
    blobs: tuple[Blob, ...]
    wish: tuple[BlobPlace, ...] = ()
    sizes: tuple[int, ...] = ()


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


class Rejoin(Request, frozen=True, tag="rejoin"):
    """Read a model again that this client has had since before the store was restarted, in these segments (ids).

    :class:`Done` answers, or :class:`Failed` (``model_not_found``) when the store has not got it there; the client may
    then send an :class:`Offer`.
    """

    key: str
    segments: tuple[int, ...]
    private_bytes: int = 0


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


class Pin(Request, frozen=True, tag="pin"):
    """Keep a model from being evicted, or (``pinned`` false) no longer; by an unambiguous beginning of its key."""

    key: str
    pinned: bool


class Compact(Request, frozen=True, tag="compact"):
    """Offer to copy blobs so that less memory holds them; :class:`Compacting` answers, :class:`Done` if none would."""

    device: str


class Compacted(Request, frozen=True, tag="compacted"):
    """All moves into the segment (by its id) are made, and it is not mapped for writing; :class:`Switched` answers."""

    segment: int


class Quarantine(Request, frozen=True, tag="quarantine"):
    """Tell that resident blobs of a model are not what their digests say; their segments get no new readers."""

    key: str
    digests: tuple[bytes, ...]


class Shutdown(Request, frozen=True, tag="shutdown"):
    """Ask the store to end. Engines keep what they have mapped."""


class Upgrade(Request, frozen=True, tag="upgrade"):
    """Ask for a store of another installation in place of this one; for the store's own user alone.

    ``python`` is its interpreter, ``environment`` that one's ``PYTHON...`` variables. The connection ends when it is
    done; else :class:`Failed` says why the store goes on as it was.
    """

    python: str
    environment: dict[str, str]


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
    """The request failed. ``code``: of a class in :mod:`shared_store.base.errors`; id 0: the whole connection."""

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


class Offer(Request, frozen=True, tag="offer"):
    """Give a model back to a store that lost it: what :class:`Attached` said once, with the fds of the segments.

    The one message of a client that has fds; they are accepted right after a :class:`Rejoin` of that key was refused.
    The client reads the model once :class:`Done` answers.
    """

    key: str
    manifest: bytes
    places: tuple[BlobPlace, ...]
    segments: tuple[SegmentInfo, ...]
    private_bytes: int = 0


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


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A blob to be copied: index of its segment in ``sources``, first byte there, and in the new segment."""

    source: int
    start: int
    offset: int
    nbytes: int
    digest: bytes


class Compacting(Reply, frozen=True, tag="compacting"):
    """What to copy. The fds: the new segment's (``target``), to be mapped for writing, then those of ``sources``."""

    target: SegmentInfo
    sources: tuple[SegmentInfo, ...]
    moves: tuple[Move, ...]


class Switched(Reply, frozen=True, tag="switched"):
    """Blobs are served from where they were copied to. None moved when too many got readers meanwhile."""

    moved_bytes: int
    freed_bytes: int


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
    | Rejoin
    | Offer
    | Leave
    | Report
    | ReportFallback
    | GetStatus
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
    | Push
)

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
