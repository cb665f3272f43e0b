"""Messages about a model: open, publish, read, rejoin, offer."""

from __future__ import annotations

from shared_store.base.manifest import Blob
from shared_store.protocol.messages.envelope import Reply, Request
from shared_store.protocol.messages.segments import BlobPlace, RestBlob, SegmentInfo


class Open(Request, frozen=True, tag="open"):
    """Request a model by its key. Answered by :class:`Attached`, or, with ``publish``, by :class:`Granted`.

    While another client publishes the model, the reply waits until that client commits or aborts.
    """

    key: str
    name: str
    engine: str
    device: str
    publish: bool


class Plan(Request, frozen=True, tag="plan"):
    """Request locations for the blobs of a granted model. Answered by :class:`Planned`.

    ``wish`` has a preferred :class:`BlobPlace` for each blob, in segments of ``sizes`` bytes: addresses that the client
    has mapped already. New blobs go there. If ``wish`` is empty, the store computes the layout. ``whole``: this client
    completes segments that return, see :class:`Planned`.
    """

    key: str
    blobs: tuple[Blob, ...]
    wish: tuple[BlobPlace, ...] = ()
    sizes: tuple[int, ...] = ()
    whole: bool = False


class Planned(Reply, frozen=True, tag="planned", omit_defaults=True):
    """Locations of the plan's blobs, in its order, in existing and in promised segments.

    ``rest``: blobs of other models in segments that return. The client writes them too, from the host copies of these
    segments: their fds follow those of the existing segments, in order of the segments. On a device that the store can
    write to, it does that itself.
    """

    places: tuple[BlobPlace, ...]
    segments: tuple[SegmentInfo, ...]
    rest: tuple[RestBlob, ...] = ()


class Fill(Request, frozen=True, tag="fill"):
    """Allocate a promised segment for writing. Answered by :class:`Filled`.

    One at a time, so that a publisher can free the original tensors that it has copied before the next allocation.
    """

    key: str
    segment: int


class Filled(Reply, frozen=True, tag="filled"):
    """The segment is allocated. The message carries its fd, to be mapped for writing until the commit."""


class Commit(Request, frozen=True, tag="commit"):
    """All bytes are written and no segment is mapped for writing. Answered by :class:`Attached`."""

    key: str
    manifest: bytes


class Attached(Reply, frozen=True, tag="attached"):
    """A committed model: its manifest, and the locations of the manifest's blobs in sealed segments."""

    manifest: bytes
    places: tuple[BlobPlace, ...]
    segments: tuple[SegmentInfo, ...]


class Abandon(Request, frozen=True, tag="abandon"):
    """Abort a publication. Its new segments are released, and the next waiter may publish."""

    key: str
    reason: str


class Leave(Request, frozen=True, tag="leave"):
    """Stop reading a model. The client has unmapped all of it."""

    key: str


class Report(Request, frozen=True, tag="report"):
    """Report a reader's private bytes of a model: small tensors, and pages that the reader wrote to."""

    key: str
    private_bytes: int


class ReportFallback(Request, frozen=True, tag="report_fallback"):
    """Report that a model was loaded the engine's stock way, and why."""

    name: str
    reason: str


class Rejoin(Request, frozen=True, tag="rejoin"):
    """Claim a model that the client has mapped since before a restart, in the segments with these ids.

    Answered by :class:`Done`, or by :class:`Wanted` when the store does not have the model there: the client may then
    send an :class:`Offer`. In protocol 1 :class:`Failed` (``model_not_found``) takes the place of :class:`Wanted`. With
    ``away`` the client sleeps, and has host copies of the segments.
    """

    key: str
    segments: tuple[int, ...]
    private_bytes: int = 0
    away: bool = False


class Wanted(Reply, frozen=True, tag="wanted"):
    """The store does not have the model. It accepts one :class:`Offer` of it, with this ticket."""

    ticket: int


class Offer(Request, frozen=True, tag="offer", omit_defaults=True):
    """Send a model to a store that lost it: the contents of the original :class:`Attached`, and the segments' fds.

    The only client message with fds. The store accepts them with the ``ticket`` of the :class:`Wanted` that answered a
    :class:`Rejoin` of the same key; in protocol 1, which has no tickets, right after it refused the :class:`Rejoin`.
    Answered by :class:`Done`: the client reads the model. With ``away`` the client sleeps, and the fds are those of the
    segments' host copies.
    """

    key: str
    manifest: bytes
    places: tuple[BlobPlace, ...]
    segments: tuple[SegmentInfo, ...]
    private_bytes: int = 0
    ticket: int = 0
    away: bool = False
