"""Requests of a reader that sleeps: host copies of its model's segments are made, retained and released.

The store must support "residency". Rules for errors, repetition and descriptors are those of a session.
"""

from __future__ import annotations

from typing import Final

from shared_store.base.errors import ModelNotFoundError, ProtocolError
from shared_store.base.manifest import Manifest, encode
from shared_store.client.connection import Connection
from shared_store.client.link import CALL_TIMEOUT_S
from shared_store.client.retained import RetainedHostCopies
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFd, OwnedFds

COPY_TIMEOUT_S: Final = 600.0
"""Seconds for an answer before which the store allocates or digests memory."""


class Sleeping:
    """The requests of one session."""

    def __init__(self, connection: Connection) -> None:
        """Use a connection."""
        self._connection = connection

    def copy_to_host(self, key: str, timeout_s: float, *, ahead: bool = False) -> tuple[messages.HostCopies, OwnedFds]:
        """Ask for host copies of the segments of a model that this session reads.

        Args:
            key: the weight key.
            timeout_s: seconds that another client, or the store, may take to make copies of the same segments.
            ahead: only if they fit without taking anything from others. The store must support "workloads".

        Returns:
            The segments, and a descriptor of each host copy that exists. Those that are promised are to be made by
            this process: :meth:`fill_host_copy`, then :meth:`add_host_copies`.

        Raises:
            ModelNotFoundError: this session does not read the model.
            OutOfMemoryError: the copies do not fit under the limit of host memory.
        """
        request = messages.CopyToHost(self._next(), key, ahead)
        return self._connection.call(request, messages.HostCopies, timeout_s, repeat=True)

    def fill_host_copy(self, key: str, segment: int) -> OwnedFd:
        """Have the promised host copy of a segment (by its id) allocated, and return its descriptor.

        Raises:
            OutOfMemoryError: host memory is full.
        """
        request = messages.FillHostCopy(self._next(), key, segment)
        _, fds = self._connection.call(request, messages.Filled, COPY_TIMEOUT_S, repeat=False)
        with fds:
            if len(fds) != 1:
                raise ProtocolError(f"the store answered FillHostCopy with {len(fds)} descriptors")
            return fds.detach()[0]

    def add_host_copies(self, key: str) -> tuple[messages.HostCopies, OwnedFds]:
        """Have the promised host copies verified and added. Returns what :meth:`copy_to_host` does, without promises.

        Raises:
            DigestMismatchError: bytes do not match their digests. The copies were dropped.
        """
        request = messages.AddHostCopies(self._next(), key)
        return self._connection.call(request, messages.HostCopies, COPY_TIMEOUT_S, repeat=False)

    def retained_segments(self, key: str) -> tuple[tuple[messages.SegmentInfo, ...], OwnedFds]:
        """Return the segments of a model that this session reads, with a new descriptor of each.

        Raises:
            ModelNotFoundError: this session does not read the model.
        """
        model = self._connection.retained.get(key)
        if model is None:
            raise ModelNotFoundError(f"this session does not read {key}")
        return model.attached.segments, OwnedFds.duplicates(model.fds.filenos())

    def go_away(self, manifest: Manifest, copies: messages.HostCopies, fds: OwnedFds) -> None:
        """Sleep: be a reader of a model that maps nothing. A restarted store is offered the host copies.

        Args:
            manifest: the model's.
            copies: the store's description of the host copies.
            fds: their descriptors, borrowed.
        """
        # The descriptors of the device's memory are closed first, or it could not be released.
        self.retain_host_copies(manifest, copies, fds)
        self._do(messages.GoAway(self._next(), manifest.key))

    def retain_host_copies(self, manifest: Manifest, copies: messages.HostCopies, fds: OwnedFds) -> None:
        """Offer these host copies to a restarted store from here on. Arguments as of :meth:`go_away`."""
        segments = tuple(messages.SegmentInfo(segment.id, segment.nbytes) for segment in copies.segments)
        attached = messages.Attached(0, encode(manifest), copies.places, segments)
        before = self._connection.retained.get(manifest.key)
        asleep = RetainedHostCopies(attached, fds)
        asleep.private_bytes = before.private_bytes if before is not None else 0
        self._connection.retained[manifest.key] = asleep

    def release_host_copies(self, key: str) -> None:
        """Need no host copies of a model any more."""
        self._do(messages.ReleaseHostCopies(self._next(), key))

    def _next(self) -> int:
        return self._connection.next_id()

    def _do(self, request: messages.Request) -> None:
        """Make a request whose answer has nothing; it is repeated for a store that restarted."""
        _, fds = self._connection.call(request, messages.Done, CALL_TIMEOUT_S, repeat=True)
        fds.close()
