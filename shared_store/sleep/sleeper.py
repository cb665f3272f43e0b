"""A model that leaves its device and returns to the same addresses.

Asleep, the process uses no memory of the device for the model: its address ranges stay reserved, and it is a reader
that is away. The model's segments leave the device when no reader of them is awake; their host copies stay.

Awake again, every segment is at its former address: shared if possible, otherwise private, with a warning.

Needs no torch. Relies on the caller that no kernel uses the model while it falls asleep.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Mapping as Map
from collections.abc import Sequence
from dataclasses import dataclass

from shared_store.base.errors import (
    ConfigError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
    WoolyError,
)
from shared_store.base.manifest import Manifest
from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.memory import Access, Backend, Mapping
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFd
from shared_store.sleep.copied_model import HOST, copy_model
from shared_store.sleep.host_copy import HostCopy, SegmentCopies, copy_segments, fetch_again
from shared_store.sleep.layout import ModelLayout
from shared_store.sleep.model import NO_STORE, Model
from shared_store.sleep.wake import private_segment, shared_segments
from shared_store.transfer.copier import Progress, Span, copier_for, ignore_progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Woken:
    """The result of waking: bytes of shared and of private segments, and why some are private."""

    shared_bytes: int
    private_bytes: int
    reason: str = ""


class Sleeper:
    """A model that can sleep and wake. Has a session of its own. Thread-safe: concurrent calls run one at a time."""

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        places: Sequence[messages.BlobPlace],
        segments: Sequence[messages.SegmentInfo],
        mappings: Sequence[tuple[int, Mapping]],
        backend: Backend,
        *,
        private_bytes: int = 0,
        timeout_s: float,
    ) -> None:
        """Begin awake.

        Args:
            session: the connection, a reader of the model.
            manifest: the model's manifest.
            places: the location of each blob, in the manifest's order.
            segments: the model's segments.
            mappings: every mapping of a segment, with the segment's index.
            backend: the backend of the device.
            private_bytes: bytes of the model that this process reports as private.
            timeout_s: seconds that another process may take to publish the model or its host copy.
        """
        self._session = session
        self._model = Model(session, manifest, ModelLayout.of(places, segments), backend, timeout_s)
        self._mappings: list[list[Mapping]] = [[] for _ in segments]
        for index, mapping in mappings:
            self._mappings[index].append(mapping)
        self._private_bytes = private_bytes
        self._host: HostCopy | None = None
        self._lock = threading.RLock()
        self.asleep = False
        """Whether this process has left the device."""
        hear_of_moves(session, self)

    @property
    def nbytes(self) -> int:
        """Bytes of the segments that are mapped while the model is awake."""
        return sum(self._model.layout.sizes)

    def prepare(self, progress: Progress = ignore_progress) -> None:
        """Obtain the host copies of the model's segments; those that do not exist are made. The model stays awake.

        Idempotent.

        Raises:
            UnsupportedError: this process wrote to the model's pages, and would lose its changes.
            OutOfMemoryError: host memory, or the store's limit for it, is too small.
            DigestMismatchError: the bytes on the device do not match their digests.
            StoreUnavailableError: there is no store.
        """
        with self._lock:
            if self._host is not None:
                return
            written = sum(mapping.private_bytes() for group in self._mappings for mapping in group)
            if written:
                raise UnsupportedError(
                    f"{self._model.manifest.name} cannot sleep: this process wrote to {written} bytes of its shared "
                    "weights, and the changes would be lost"
                )
            self._host = self._copy(progress)

    def copy_ahead(self, progress: Progress = ignore_progress) -> bool:
        """Have host copies made before they are needed, so that the first departure copies no weights.

        The model stays awake, and nobody needs the copies: the store drops them when it needs their memory. Kernels may
        use the model meanwhile.

        Returns:
            False if the store is of an earlier version, or the copies do not fit beside what others have.

        Raises:
            DigestMismatchError: the bytes on the device do not match their digests.
            StoreUnavailableError: there is no store.
        """
        with self._lock:
            if self.asleep or self._host is not None:
                return True
            if not self._session.supports(messages.WORKLOADS):
                return False
            try:
                host = copy_segments(self._model, progress, ahead=True)
            except (OutOfMemoryError, ConfigError, ModelNotFoundError) as error:
                log.debug("wooly: no host copies of %s ahead: %s", self._model.manifest.name, error)
                return False
            host.leave(self._model)
            return True

    def stay_awake(self) -> None:
        """Release the host copies that :meth:`prepare` opened. Does nothing while the model sleeps."""
        with self._lock:
            if not self.asleep:
                self._leave_host_copy()

    def sleep(self, progress: Progress = ignore_progress) -> None:
        """Leave the device. No kernel may use the model any more. Idempotent.

        Raises as :meth:`prepare` does; the model is awake then.
        """
        with self._lock:
            if self.asleep:
                return
            self.prepare(progress)
            assert self._host is not None  # noqa: S101 - prepared above
            self.asleep = True
            self._unmap()
            self._host.go_away(self._model, self._private_bytes)

    def fetch_again(self) -> None:
        """Exchange the descriptors of host copies: the store moved these. Does nothing unless the model sleeps."""
        with self._lock:
            if not self.asleep or not isinstance(self._host, SegmentCopies):
                return
            try:
                found = fetch_again(self._model)
            except (WoolyError, OSError) as error:  # this process wakes from the copies that it has
                log.debug("wooly: could not exchange host copies of %s: %s", self._model.manifest.name, error)
                return
            before, self._host = self._host, found
            before.close()

    def wake(self, progress: Progress = ignore_progress) -> Woken:
        """Return to the device, at the former addresses. Idempotent.

        Raises:
            OutOfMemoryError: the device, or the store's limit for it, has too little memory.
            DigestMismatchError: the host copy does not match the digests.
            WoolyError: another failure. After every error the model is asleep and unmapped.
        """
        with self._lock:
            if not self.asleep:
                self._leave_host_copy()
                return Woken(self.nbytes, 0)
            assert self._host is not None  # noqa: S101 - the model is asleep
            private, reason = self._return(self._host, progress)
            self.asleep = False
            return self._report(private, reason)

    def _return(self, host: HostCopy, progress: Progress) -> tuple[list[int], str]:
        """Map a segment behind every address range. Returns the indices of the private segments, and why they are."""
        model = self._model
        with copier_for(model.backend) as copier, contextlib.ExitStack() as owned:
            found, reason = shared_segments(model, host, copier, progress)
            for fd in found.values():
                owned.enter_context(fd)
            private = [index for index in range(len(self._mappings)) if index not in found]
            try:
                for index in private:
                    found[index] = owned.enter_context(private_segment(model, index, host, copier, progress))
                self._map(found)
            except BaseException:
                self._unmap()
                host.go_away(model, self._private_bytes)
                raise
        return private, reason

    def _report(self, private: Sequence[int], reason: str) -> Woken:
        """Report to the store how much of the model is shared, and log if a part is not."""
        manifest, sizes = self._model.manifest, self._model.layout.sizes
        private_bytes = sum(sizes[index] for index in private)
        woken = Woken(self.nbytes - private_bytes, private_bytes, reason if private else "")
        if not woken.shared_bytes:
            self._model.leave(manifest.key)
        self._leave_host_copy()
        with contextlib.suppress(*NO_STORE):
            if woken.shared_bytes:
                self._session.report(manifest.key, self._private_bytes + private_bytes)
            if private:
                self._session.report_fallback(manifest.name, f"woke up in private memory: {reason}")
        if private:
            log.warning(
                "wooly: %s woke up with %.1f MiB private and %.1f MiB shared: %s",
                manifest.name,
                private_bytes / 2**20,
                woken.shared_bytes / 2**20,
                reason,
            )
        return woken

    def _copy(self, progress: Progress) -> HostCopy:
        """Return a host copy. A model of its own, where the store has no host copies of segments for this process."""
        if self._session.supports(messages.RESIDENCY):
            try:
                return copy_segments(self._model, progress)
            except ModelNotFoundError as error:
                log.debug("wooly: the host copy of %s is a model of its own: %s", self._model.manifest.name, error)
        if self._model.backend.device == HOST:
            raise UnsupportedError(
                f"{self._model.manifest.name} cannot leave host memory: the store has it no longer, or its version "
                "writes no files; restart this process to share it again"
            )
        return copy_model(self._model, self._spans(), progress)

    def _spans(self) -> list[Span]:
        """Return the address and size of each blob, in the manifest's order."""
        located = zip(self._model.layout.locations, self._model.manifest.blobs, strict=True)
        return [(self._mappings[place.segment][0].address + place.offset, blob.nbytes) for place, blob in located]

    def _map(self, fds: Map[int, OwnedFd]) -> None:
        backend = self._model.backend
        with mapping_phase(self._session, backend):
            for index, nbytes in enumerate(self._model.layout.sizes):
                for mapping in self._mappings[index]:
                    mapping.release_segment()  # in case falling asleep could not
                    mapping.set_segment(backend.import_fd(fds[index].fileno(), nbytes))
                    mapping.map(Access.READ)

    def _unmap(self) -> None:
        """Release the segments; the address ranges stay reserved."""
        with mapping_phase(self._session, self._model.backend):
            for group in self._mappings:
                for mapping in group:
                    mapping.release_segment()

    def _leave_host_copy(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.leave(self._model)


def hear_of_moves(session: Session, sleeper: Sleeper) -> None:
    """Have a sleeper exchange its host copies when the store has moved them. The session does not keep it alive."""
    refer = weakref.ref(sleeper)

    def moved(_key: str) -> None:
        found = refer()
        if found is not None:  # the thread that reads must not wait for an answer
            threading.Thread(target=found.fetch_again, name="wooly-host-copies", daemon=True).start()

    session.hear("host_copies", moved)
