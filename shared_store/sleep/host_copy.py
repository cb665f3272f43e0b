"""Host copies: the blobs of a sleeping model in host memory, the source from which it wakes.

A segment's host copy is a tier of it, see :mod:`shared_store.store.state.residency`: the store has at most one, which
all sleeping readers of all models in the segment share. The first of them makes it. A segment in host memory is a file,
so copies use the same code as saved models.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

from shared_store.base.errors import DigestMismatchError, WoolyError
from shared_store.base.manifest import Manifest
from shared_store.client.mapping_phase import mapping_phase
from shared_store.memory import Access, Mapping
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFds
from shared_store.sleep.model import NO_STORE, Model, log
from shared_store.transfer.copier import Piece, Progress, Span, copier_for, ignore_progress
from shared_store.transfer.digest_check import wrong_copy
from shared_store.transfer.files import OpenFile
from shared_store.transfer.workers import Workers


class HostCopy(ABC):
    """An open host copy of a model, the source of its blobs. Closes its descriptors when closed or collected."""

    def __init__(self, manifest: Manifest, places: Sequence[messages.BlobPlace], fds: OwnedFds) -> None:
        """Take over the descriptors of the segments, also if this raises.

        Args:
            manifest: the model's.
            places: the location of each blob, in the manifest's order.
            fds: of the segments in host memory that ``places`` numbers.
        """
        self.manifest = manifest
        with contextlib.ExitStack() as owned:
            owned.enter_context(fds)
            self._files = [owned.enter_context(OpenFile(manifest.name, fd)) for fd in fds.detach()]
            self._locations = {
                blob.digest: (self._files[place.segment], place.offset)
                for blob, place in zip(manifest.blobs, places, strict=True)
            }
            self._close = weakref.finalize(self, owned.pop_all().close)

    def piece(self, digest: bytes, span: Span) -> Piece:
        """Return the copy of a blob from its segment to a span of device memory."""
        return Piece(*self._locations[digest], *span)

    def mismatch(self, digest: bytes, actual: bytes) -> DigestMismatchError:
        """Return the error for a blob whose copy on the device has another digest."""
        return wrong_copy(digest, actual)

    def duplicates(self) -> OwnedFds:
        """Return a new descriptor of each segment."""
        return OwnedFds.duplicates(file.fd.fileno() for file in self._files)

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        self._close()

    @abstractmethod
    def go_away(self, model: Model, private_bytes: int) -> None:
        """Tell the store, if there is one, that this process sleeps with the model, which is unmapped.

        ``private_bytes``: bytes of the model that this process reports as private.
        """

    @abstractmethod
    def leave(self, model: Model) -> None:
        """Close the host copy, and tell the store that this process does not need it any more."""


class SegmentCopies(HostCopy):
    """The host copies of a model's segments."""

    def __init__(self, manifest: Manifest, copies: messages.HostCopies, fds: OwnedFds) -> None:
        """Take over the descriptors, also if this raises. ``copies``: the store's description of them."""
        self._copies = copies
        super().__init__(manifest, copies.places, fds)

    def go_away(self, model: Model, private_bytes: int) -> None:  # noqa: D102 - documented by the interface
        session, key = model.session, self.manifest.key
        try:
            with self.duplicates() as fds:
                session.sleeping.go_away(self.manifest, self._copies, fds)
            session.report(key, private_bytes)
        except NO_STORE as error:
            log.debug("wooly: could not report to the store that %s sleeps: %s", key[:12], error)
        except WoolyError as error:  # this process has the bytes, so it sleeps in any case
            log.warning("wooly: the store cannot keep %s for this sleeping process: %s", self.manifest.name, error)
            model.leave(key)

    def leave(self, model: Model) -> None:  # noqa: D102 - documented by the interface
        self.close()
        try:
            model.session.sleeping.release_host_copies(self.manifest.key)
        except NO_STORE as error:
            log.debug("wooly: could not release host copies of %s: %s", self.manifest.key[:12], error)


def fetch_again(model: Model) -> SegmentCopies:
    """Return the host copies that this process sleeps with, from where they are now.

    Raises:
        ModelNotFoundError: the store has none of the model as it is here.
        StoreUnavailableError: there is no store.
    """
    session, key = model.session, model.manifest.key
    copies, fds = session.sleeping.copy_to_host(key, model.timeout_s)
    found = SegmentCopies(model.manifest, copies, fds)
    try:
        with found.duplicates() as held:
            session.sleeping.retain_host_copies(model.manifest, copies, held)
    except BaseException:
        found.close()
        raise
    return found


def copy_segments(model: Model, progress: Progress = ignore_progress, *, ahead: bool = False) -> SegmentCopies:
    """Return the host copies of a model's segments. Those that do not exist are made.

    Args:
        model: the model, which this process reads.
        progress: called with bytes copied.
        ahead: only if the copies fit without taking anything from others.

    Raises:
        ModelNotFoundError: this process does not read the model, or the store withdrew it.
        OutOfMemoryError: host memory, or the store's limit for it, is too small.
        DigestMismatchError: bytes on the device do not match their digests.
        StoreUnavailableError: there is no store.
    """
    session, key = model.session, model.manifest.key
    copies, fds = session.sleeping.copy_to_host(key, model.timeout_s, ahead=ahead)
    promised = [segment for segment in copies.segments if segment.promised]
    try:
        if promised:
            fds.close()  # the answer to the last request has all of them
            _fill(model, promised, progress)
            copies, fds = session.sleeping.add_host_copies(key)
        return SegmentCopies(model.manifest, copies, fds)
    except BaseException:
        fds.close()
        if session.alive:
            with contextlib.suppress(WoolyError):  # the first error is the one to report
                session.sleeping.release_host_copies(key)
        raise


def _fill(model: Model, promised: Sequence[messages.HostSegment], progress: Progress) -> None:
    """Copy segments from their device to host memory, completely: they may have blobs of other models, too."""
    session, backend, key = model.session, model.backend, model.manifest.key
    with contextlib.ExitStack() as opened:
        infos, fds = session.sleeping.retained_segments(key)
        opened.enter_context(fds)
        source = dict(zip((info.id for info in infos), fds, strict=True))
        mappings = opened.enter_context(contextlib.ExitStack())
        with copier_for(backend) as copier, Workers(copier, "save", progress) as workers:
            for segment in promised:
                with mapping_phase(session, backend):
                    imported = backend.import_fd(source[segment.id].fileno(), segment.nbytes)
                    mapping = mappings.enter_context(Mapping(backend, imported))
                    mapping.map(Access.READ)
                fd = session.sleeping.fill_host_copy(key, segment.id)
                file = opened.enter_context(OpenFile("a segment in host memory", fd))
                workers.put(Piece(file, 0, mapping.address, segment.nbytes))
        with mapping_phase(session, backend):
            mappings.close()
