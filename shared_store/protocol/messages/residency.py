"""Messages of readers that sleep: host copies of a model's segments, and leaves without them.

A reader that is to sleep sends :class:`CopyToHost`, makes the copies that are missing (:class:`FillHostCopy`,
:class:`AddHostCopies`), unmaps the model, and sends :class:`GoAway`. It wakes with ``Open``: the answer is
``Attached``, or ``Granted`` if the model is not on its device: then the client publishes it from the host copies. It
needs those until it sends :class:`ReleaseHostCopies`, leaves the model, or disconnects.

Only for stores with the capability ``residency``.
"""

from __future__ import annotations

import msgspec

from shared_store.protocol.messages.envelope import Reply, Request
from shared_store.protocol.messages.segments import BlobPlace

RESIDENCY = "residency"
"""The capability of stores that answer these messages."""


class HostSegment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A segment's id, its size in bytes, and whether its host copy is still to be made, by this client."""

    id: int
    nbytes: int
    promised: bool = False


class CopyToHost(Request, frozen=True, tag="copy_to_host", omit_defaults=True):
    """Request host copies of the segments of a model that this client reads. Answered by :class:`HostCopies`.

    While another client makes copies of the same segments, the reply waits. ``ahead``: the client does not leave now.
    The request fails (``out_of_memory``) unless the copies fit without taking anything from others.

    A client that sleeps sends it again after a push ``host_copies``, whose detail is the key: its copies moved, and it
    closes the fds that it has for those in the reply.
    """

    key: str
    ahead: bool = False


class HostCopies(Reply, frozen=True, tag="host_copies"):
    """The segments of a model, and the place of each blob of its manifest in them and in their host copies.

    Carries an fd of the host copy of each segment that is not ``promised``, in order.
    """

    places: tuple[BlobPlace, ...]
    segments: tuple[HostSegment, ...]


class FillHostCopy(Request, frozen=True, tag="fill_host_copy"):
    """Allocate a promised host copy, in host memory or as a file. Answered by ``Filled``, with the fd.

    The fd is to be written, and not to be kept mapped.

    All bytes of the ``segment`` (its id) are to be written, at the same offsets.
    """

    key: str
    segment: int


class AddHostCopies(Request, frozen=True, tag="add_host_copies"):
    """All promised host copies are written. Verified, and answered by :class:`HostCopies` without promised ones."""

    key: str


class GoAway(Request, frozen=True, tag="go_away"):
    """This reader unmapped the model, closed its fds, and sleeps. Answered by ``Done``."""

    key: str


class ReleaseHostCopies(Request, frozen=True, tag="release_host_copies"):
    """This client needs no host copies of the model; aborts the copies that it makes. Answered by ``Done``."""

    key: str
