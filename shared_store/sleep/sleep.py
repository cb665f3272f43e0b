"""A model that this process reads leaves its device, and comes back to the addresses that it had.

Asleep, a process holds no memory of the model on the device: its address ranges stay reserved, and it reads a *host
copy* of the blobs, a model of the store on ``cpu`` that all who sleep share. The store drops the model from the device
when nobody reads it there any more.

Awake again, what the store has where it was is mapped. What it has not is published again from the host copy, laid out
as it was, so that whoever wakes next finds it. What the store has in other places by then (another process published
it, or it was compacted) becomes this process's own memory, with a warning: tensors and captured graphs hold addresses
inside of segments. The store allocates, so its limits hold, and of several that wake at once one publishes.

Needs no torch. Copies in several threads, as saving to files does; a segment in host memory is a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from shared_store.base import manifest as manifests
from shared_store.base.errors import (
    ConnectionLostError,
    DigestMismatchError,
    StoreUnavailableError,
    TimedOutError,
    UnsupportedError,
    WoolyError,
)
from shared_store.base.keys import host_key
from shared_store.base.manifest import Manifest
from shared_store.client.session import Session
from shared_store.memory import Access, Backend, Mapping
from shared_store.memory.mapping import map_writable
from shared_store.protocol import messages, wire
from shared_store.runtime.fds import OwnedFds, duplicate
from shared_store.transfer.copier import Copier, Piece, Progress, Span, copier_for, unheard
from shared_store.transfer.files import OpenFile, close_all
from shared_store.transfer.reading import duplicated
from shared_store.transfer.workers import Workers

log = logging.getLogger(__name__)

HOST = "cpu"

_TRIES = 3
"""Stores that are asked for the model, when one after the other is lost over it."""

_GONE = (StoreUnavailableError, TimedOutError)
"""What a call raises that no store has answered."""


@dataclass
class Extent:
    """A segment as it lay: its size, and blobs (by their index in the manifest) with their first bytes in it.

    ``mappings``: every range of this process that it was mapped in.
    """

    nbytes: int
    blobs: dict[int, int] = field(default_factory=dict)
    mappings: list[Mapping] = field(default_factory=list)


@dataclass(frozen=True)
class Woken:
    """Bytes of the model's segments that are the store's, and those that are this process's own now, and why."""

    shared_bytes: int
    private_bytes: int
    reason: str = ""


class _HostCopy:
    """Where the blobs lie in host memory, by their digests: a file (a segment) and the first byte in it."""

    def __init__(self, key: str, attached: messages.Attached, owned: OwnedFds) -> None:
        """Takes over the fds."""
        self.key = key
        self.manifest = manifests.decode(attached.manifest)
        fds = [fd.detach() for fd in owned.detach()]
        files = [OpenFile(self.manifest.name, fd) for fd in fds]
        self._close = weakref.finalize(self, wire.close_fds, tuple(fds))
        self._places = {
            blob.digest: (files[place.segment], place.offset)
            for blob, place in zip(self.manifest.blobs, attached.places, strict=True)
        }

    def piece(self, digest: bytes, span: Span) -> Piece:
        """A blob, and where it is or goes on the device."""
        return Piece(*self._places[digest], *span)

    def close(self) -> None:
        self._close()


class Sleeper:
    """A model that this process reads, in a session of its own. Calls from several threads take turns."""

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
        """The model is awake.

        Args:
            session: reads the model.
            manifest: the model.
            places: where its blobs lie, in their order.
            segments: what they lie in.
            mappings: every range that a segment is mapped in, by the segment's index.
            backend: of the device.
            private_bytes: what this process says it holds of the model for itself.
            timeout_s: seconds that another process may take to publish the model or its host copy.
        """
        self._session, self._manifest, self._backend = session, manifest, backend
        self._private_bytes = private_bytes
        self._timeout_s = timeout_s
        self._extents = [Extent(segment.nbytes) for segment in segments]
        for index, place in enumerate(places):
            self._extents[place.segment].blobs[index] = place.offset
        for number, mapping in mappings:
            self._extents[number].mappings.append(mapping)
        self._wish = tuple(messages.BlobPlace(place.segment, place.offset) for place in places)
        self._host: _HostCopy | None = None
        self._lock = threading.RLock()
        self.asleep = False
        """Whether the model is off the device, as far as this process goes."""

    @property
    def nbytes(self) -> int:
        """Bytes of the segments that are mapped when the model is awake."""
        return sum(extent.nbytes for extent in self._extents)

    # Falling asleep.

    def prepare(self, progress: Progress = unheard) -> None:
        """Read the host copy, making it if nobody has; nothing else changes. Idempotent.

        Raises:
            UnsupportedError: this process wrote to the model, and would lose that.
            OutOfMemoryError: host memory, or the store's limit for it, has no room.
            DigestMismatchError: what is on the device is not what its digests say.
            StoreUnavailableError: there is no store to hold the copy.
        """
        with self._lock:
            if self._host is not None:
                return
            written = sum(mapping.private_bytes() for extent in self._extents for mapping in extent.mappings)
            if written:
                raise UnsupportedError(
                    f"{self._manifest.name} cannot sleep: this process wrote to {written} bytes of it, which would go"
                )
            self._host = self._open_host_copy(progress)

    def stay_awake(self) -> None:
        """Leave the host copy that was prepared, if the model is awake."""
        with self._lock:
            if not self.asleep:
                self._leave_host_copy()

    def sleep(self, progress: Progress = unheard) -> None:
        """Leave the device; no kernel may still use the model. Idempotent.

        Raises as :meth:`prepare` does; the model is awake then.
        """
        with self._lock:
            if self.asleep:
                return
            self.prepare(progress)
            self.asleep = True
            self._let_go()
            self._leave(self._manifest.key)
            with contextlib.suppress(*_GONE):  # it is only what the status shows
                assert self._host is not None  # noqa: S101 - prepared above
                self._session.report(self._host.key, self._private_bytes)

    def _open_host_copy(self, progress: Progress) -> _HostCopy:
        key = host_key(self._manifest.key, (blob.digest for blob in self._manifest.blobs))
        opened = self._open(key, HOST, name=f"{self._manifest.name} (host copy)")
        if opened is None:
            with self._publishing(key):
                opened = self._publish_host_copy(key, progress)
        host = _HostCopy(key, *opened)
        if host.manifest.blobs != self._manifest.blobs:
            host.close()
            self._leave(key)
            raise DigestMismatchError(f"the host copy of {self._manifest.name} is one of another model")
        return host

    def _publish_host_copy(self, key: str, progress: Progress) -> tuple[messages.Attached, OwnedFds]:
        """Copy what is mapped to host memory; the store checks the digests."""
        manifest = msgspec.structs.replace(
            self._manifest, key=key, device=HOST, name=f"{self._manifest.name} (host copy)"
        )
        planned, fds = self._session.plan(key, manifest.blobs)
        fds.close()  # of segments that exist: nothing is written there
        files: dict[int, OpenFile] = {}
        try:
            with copier_for(self._backend) as copier, Workers(copier, "save", progress) as workers:
                for index, place in enumerate(planned.places):
                    if not place.new:
                        continue
                    if place.segment not in files:
                        fd = self._session.fill(key, planned.segments[place.segment].id).detach()
                        files[place.segment] = OpenFile("a segment in host memory", fd)
                    span = (self._address(index), manifest.blobs[index].nbytes)
                    workers.put(Piece(files[place.segment], place.offset, *span))
        finally:
            close_all(list(files.values()))
        return self._session.commit(manifest)

    def _address(self, index: int) -> int:
        place = self._wish[index]
        return self._extents[place.segment].mappings[0].address + place.offset

    def _let_go(self) -> None:
        for extent in self._extents:
            for mapping in extent.mappings:
                mapping.release_segment()

    # Waking up.

    def wake(self, progress: Progress = unheard) -> Woken:
        """Come back to the device, at the old addresses. Idempotent.

        Raises:
            OutOfMemoryError: the device, or the store's limit for it, has no room.
            DigestMismatchError: the host copy is not what its digests say.
            WoolyError: something else failed. As after every error, the model is asleep and nothing of it is mapped.
        """
        with self._lock:
            if not self.asleep:
                self._leave_host_copy()  # if one was prepared
                return Woken(self.nbytes, 0)
            host = self._host
            assert host is not None  # noqa: S101 - it is asleep
            with copier_for(self._backend) as copier:
                found, reason = self._obtain(host, copier, progress)
                try:
                    own = [number for number, fd in enumerate(found) if fd is None]
                    for number in own:
                        found[number] = self._own_memory(self._extents[number], host, copier, progress)
                    self._map(found)
                except BaseException:
                    self._let_go()
                    self._leave(self._manifest.key)
                    raise
                finally:
                    wire.close_fds([fd for fd in found if fd is not None])
            self.asleep = False
            return self._told(own, reason)

    def _told(self, own: Sequence[int], reason: str) -> Woken:
        """Tell the store what this process has now, and whoever reads the log if that is not as it should be."""
        private = sum(self._extents[number].nbytes for number in own)
        woken = Woken(self.nbytes - private, private, reason if own else "")
        if not woken.shared_bytes:
            self._leave(self._manifest.key)
        self._leave_host_copy()
        with contextlib.suppress(*_GONE):
            if woken.shared_bytes:
                self._session.report(self._manifest.key, self._private_bytes + private)
            if own:
                self._session.report_fallback(self._manifest.name, f"woken up in memory of its own: {reason}")
        if own:
            log.warning(
                "wooly: %s woke up with %.1f MiB in memory of its own, and %.1f MiB shared: %s",
                self._manifest.name,
                private / 2**20,
                woken.shared_bytes / 2**20,
                reason,
            )
        return woken

    def _obtain(self, host: _HostCopy, copier: Copier, progress: Progress) -> tuple[list[int | None], str]:
        """An fd for each extent (the caller's) of what the store has as it was; None, and why, where it has not."""
        try:
            (attached, fds), filled = self._attach_or_publish(host, copier, progress)
        except _GONE as error:
            return [None] * len(self._extents), f"no store can be asked for it ({error})"
        try:
            found: list[int | None] = []
            for number, extent in enumerate(self._extents):
                at = filled.get(number)
                segment = self._same(extent, attached) if at is None else self._index_of(at, attached)
                found.append(None if segment is None else duplicated([fds.filenos()[segment]])[0])
        finally:
            fds.close()
        return found, "the store has it in other places by now"

    def _attach_or_publish(
        self, host: _HostCopy, copier: Copier, progress: Progress
    ) -> tuple[tuple[messages.Attached, OwnedFds], dict[int, int]]:
        """What the store has of the model, and what :meth:`_publish` filled, if it did."""
        key = self._manifest.key
        for left in reversed(range(_TRIES)):
            try:
                opened = self._open(key, self._backend.device, name=self._manifest.name)
                if opened is not None:
                    return opened, {}
                with self._publishing(key):
                    return self._publish(host, copier, progress)
            except ConnectionLostError:
                if not left:
                    raise
        raise AssertionError  # the last try returns or raises

    def _same(self, extent: Extent, attached: messages.Attached) -> int | None:
        """The segment that is as the extent was, for all blobs of this model; if there is one."""
        segments = {attached.places[index].segment for index in extent.blobs}
        if len(segments) != 1:
            return None
        (segment,) = segments
        same = attached.segments[segment].nbytes == extent.nbytes and all(
            attached.places[index].offset == offset for index, offset in extent.blobs.items()
        )
        same = same and manifests.decode(attached.manifest).blobs == self._manifest.blobs
        return segment if same else None

    @staticmethod
    def _index_of(segment: int, attached: messages.Attached) -> int | None:
        return next((index for index, info in enumerate(attached.segments) if info.id == segment), None)

    def _publish(
        self, host: _HostCopy, copier: Copier, progress: Progress
    ) -> tuple[tuple[messages.Attached, OwnedFds], dict[int, int]]:
        """Publish the model again; the store's answer, and ids of segments that were filled as extents were."""
        key, blobs = self._manifest.key, self._manifest.blobs
        sizes = [extent.nbytes for extent in self._extents]
        planned, fds = self._session.plan(key, blobs, wish=self._wish, sizes=sizes)
        fds.close()  # of segments that exist: nothing is written there
        filled: dict[int, int] = {}
        with contextlib.ExitStack() as writable:
            spans: list[tuple[bytes, Span]] = []
            with Workers(copier, "load", progress) as workers:
                for number, info in enumerate(planned.segments):
                    if not info.promised:
                        continue
                    contents = {
                        index: place.offset
                        for index, place in enumerate(planned.places)
                        if place.segment == number and place.new
                    }
                    whole = self._extent_of(contents, info.nbytes)
                    if whole is not None:  # also what lies elsewhere by now: this process has addresses for it here
                        contents = self._extents[whole].blobs
                        filled[whole] = info.id
                    address = writable.enter_context(
                        map_writable(self._backend, self._session.fill(key, info.id), info.nbytes)
                    )
                    spans += self._load(contents, address, host, workers)
            _check(spans, copier)
        return self._session.commit(self._manifest), filled

    def _extent_of(self, contents: dict[int, int], nbytes: int) -> int | None:
        """The extent that has all of these blobs where they go now, if its size is this."""
        numbers = {self._wish[index].segment for index in contents}
        if len(numbers) != 1:
            return None
        (number,) = numbers
        extent = self._extents[number]
        return number if extent.nbytes == nbytes and contents.items() <= extent.blobs.items() else None

    def _own_memory(self, extent: Extent, host: _HostCopy, copier: Copier, progress: Progress) -> int:
        """Memory of this process's own with an extent's blobs in their places: an fd, the caller's."""
        memory = self._backend.create(extent.nbytes)
        try:
            fd = self._backend.export(memory).detach()
        finally:
            self._backend.release(memory)  # the fd holds it
        try:
            with map_writable(self._backend, duplicate(fd), extent.nbytes) as address:
                with Workers(copier, "load", progress) as workers:
                    spans = self._load(extent.blobs, address, host, workers)
                _check(spans, copier)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _load(
        self, contents: dict[int, int], address: int, host: _HostCopy, workers: Workers
    ) -> list[tuple[bytes, Span]]:
        """Have blobs copied to where they go from an address on; digests, and where they will be."""
        spans: dict[Span, bytes] = {}
        for index, offset in contents.items():
            blob = self._manifest.blobs[index]
            spans[address + offset, blob.nbytes] = blob.digest  # one blob may be in the manifest more than once
        for span, digest in spans.items():
            workers.put(host.piece(digest, span))
        return [(digest, span) for span, digest in spans.items()]

    def _map(self, fds: Sequence[int | None]) -> None:
        for extent, fd in zip(self._extents, fds, strict=True):
            for mapping in extent.mappings:
                assert fd is not None  # noqa: S101 - every extent has memory by now
                mapping.release_segment()  # what could not be let go before
                mapping.set_segment(self._backend.import_fd(fd, extent.nbytes))
                mapping.map(Access.READ)

    # Both ways.

    def _open(self, key: str, device: str, *, name: str) -> tuple[messages.Attached, OwnedFds] | None:
        return self._session.open(
            key, name=name, engine=self._manifest.engine, device=device, publish=True, timeout_s=self._timeout_s
        )

    @contextlib.contextmanager
    def _publishing(self, key: str) -> Iterator[None]:
        """Give the publication up if the block fails."""
        try:
            yield
        except BaseException:
            if self._session.alive:
                with contextlib.suppress(WoolyError):  # the first error is the one to tell
                    self._session.abandon(key, "it could not be copied")
            raise

    def _leave(self, key: str) -> None:
        """Read a model no more. A store that is gone has forgotten it by itself."""
        try:
            self._session.leave(key)
        except _GONE as error:
            log.debug("wooly: the store was not told that a model is read no more: %s", error)

    def _leave_host_copy(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.close()
            self._leave(host.key)


def _check(spans: Sequence[tuple[bytes, Span]], copier: Copier) -> None:
    """Raise :class:`DigestMismatchError` where a copy is not what it is a copy of."""
    found = copier.digests([span for _, span in spans])
    for (digest, _), actual in zip(spans, found, strict=True):
        if digest != actual:
            raise DigestMismatchError(f"the copy of blob {digest.hex()[:16]} has digest {actual.hex()[:16]}")
