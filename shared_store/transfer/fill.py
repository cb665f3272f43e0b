"""Filling segments: copy blobs from files into device memory that is not shared yet, and check their digests there.

Used for segments that the store allocates for a publication, and for a process's private segments. Relies on the caller
to commit or abort the publication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from shared_store.base.errors import WoolyError
from shared_store.base.manifest import Blob
from shared_store.client.mapping_phase import mapping_phase
from shared_store.client.session import Session
from shared_store.memory import Backend
from shared_store.memory.mapping import map_writable
from shared_store.protocol import messages
from shared_store.runtime.fds import OwnedFd
from shared_store.transfer.copier import Copier, Piece, Progress, Span, ignore_progress
from shared_store.transfer.digest_check import ExpectedSpan, mismatches
from shared_store.transfer.rest import Rest
from shared_store.transfer.workers import Workers

Contents: TypeAlias = Sequence[tuple[Blob, int]]
"""Blobs of one segment, each with its offset in bytes."""


class BlobSource(Protocol):
    """Files that contain blobs."""

    def piece(self, digest: bytes, span: Span) -> Piece:
        """Return the copy of a blob from its file to a span of memory."""
        ...

    def mismatch(self, digest: bytes, actual: bytes) -> WoolyError:
        """Return the error to raise when the copy of a blob has another digest."""
        ...


def new_blobs(blobs: Sequence[Blob], planned: messages.Planned) -> dict[int, list[tuple[Blob, int]]]:
    """Return the blobs that a plan assigns to new locations, by the index of their segment."""
    found: dict[int, list[tuple[Blob, int]]] = {}
    for blob, place in zip(blobs, planned.places, strict=True):
        if place.new:
            found.setdefault(place.segment, []).append((blob, place.offset))
    return found


def fill_promised(
    session: Session,
    key: str,
    planned: messages.Planned,
    contents: Mapping[int, Contents],
    source: BlobSource,
    backend: Backend,
    copier: Copier,
    progress: Progress = ignore_progress,
    rest: Rest | None = None,
) -> None:
    """Have the store allocate the promised segments of a plan, and fill them. Nothing stays mapped.

    Args:
        session: the connection that publishes ``key``.
        key: the weight key.
        planned: the store's answer to the plan.
        contents: blobs to write, by the index of their segment in ``planned.segments``.
        source: files to read them from.
        backend: the backend of the publication's device.
        copier: the copier of that device.
        progress: called with bytes copied.
        rest: blobs of other models in segments that return; None: ``contents`` has them, or there are none.

    Raises:
        OutOfMemoryError: the device has too little memory.
        WoolyError: a copy has another digest; the error is ``source.mismatch(...)``.
    """
    with contextlib.ExitStack() as mappings:
        written: list[ExpectedSpan] = []
        with Workers(copier, "load", progress) as workers:
            for index, info in enumerate(planned.segments):
                if info.promised:
                    fd = session.fill(key, info.id)
                    with mapping_phase(session, backend):
                        address = mappings.enter_context(map_writable(backend, fd, info.nbytes))
                    written += _load(contents.get(index, ()), address, source, workers)
                    for span, piece in rest.pieces(index, address) if rest is not None else ():
                        written.append(span)
                        workers.put(piece)
        _check(written, source, copier)
        with mapping_phase(session, backend):
            mappings.close()


def fill_segment(
    fd: OwnedFd,
    nbytes: int,
    contents: Contents,
    source: BlobSource,
    backend: Backend,
    copier: Copier,
    progress: Progress = ignore_progress,
) -> None:
    """Fill one segment of ``nbytes`` bytes. The descriptor is borrowed. Raises as :func:`fill_promised` does."""
    with map_writable(backend, fd.dup(), nbytes) as address:
        with Workers(copier, "load", progress) as workers:
            written = _load(contents, address, source, workers)
        _check(written, source, copier)


def _load(contents: Contents, address: int, source: BlobSource, workers: Workers) -> list[ExpectedSpan]:
    """Queue the copies of a segment's blobs. Return the digest and span of each."""
    # A manifest may name one blob more than once: copy each span once.
    spans = {(address + offset, blob.nbytes): blob.digest for blob, offset in contents}
    for span, digest in spans.items():
        workers.put(source.piece(digest, span))
    return [(digest, span) for span, digest in spans.items()]


def _check(written: Sequence[ExpectedSpan], source: BlobSource, copier: Copier) -> None:
    for digest, actual in mismatches(written, copier).items():
        raise source.mismatch(digest, actual)
