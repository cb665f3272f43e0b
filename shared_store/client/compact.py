"""Compaction by a client: copies blobs to where the store wants them, for memory that the store cannot read itself.

Needs no torch. On a GPU it needs cuda-bindings for copying and CuPy for digests. What is copied is digested where it
lies now, before the store is told; in host memory the store digests it once more itself.

A client that ends in the middle leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from shared_store.base.digest import digest_at
from shared_store.base.errors import DigestMismatchError
from shared_store.client.session import Session
from shared_store.memory import Backend, Mapping, backend_for
from shared_store.memory.blob_copy import Copy, close_all, copy_blobs, copy_host
from shared_store.protocol import messages


class Compacted(NamedTuple):
    """What compacting a device came to: ``segments`` that were made, bytes ``moved`` there, bytes ``freed``."""

    device: str
    segments: int
    moved_bytes: int
    freed_bytes: int


def compact(session: Session, device: str, backend: Backend | None = None) -> Compacted:
    """Copy segment by segment, until the store has nothing more to gain.

    Raises:
        UnknownDeviceError: the store, or this process, has no such device.
        DigestMismatchError: a copy is wrong; what it is a copy of may be, too (`wooly verify`).
    """
    found = session.compact(device)
    segments = moved = freed = 0
    if found:
        with _worker(backend or backend_for(device)) as work:
            while found:
                task, fds = found
                with fds:
                    work.copy(task, fds.filenos())
                switched = session.compacted(task.target.id)
                if not switched.freed_bytes:
                    break  # readers came meanwhile
                segments += 1
                moved, freed = moved + switched.moved_bytes, freed + switched.freed_bytes
                found = session.compact(device)
    return Compacted(device, segments, moved, freed)


class _Worker(NamedTuple):
    """Copies and digests memory of one device, by addresses."""

    backend: Backend
    copy_bytes: Callable[[int, int, int], None]
    settle: Callable[[], None]
    digests: Callable[[Sequence[tuple[int, int]]], list[bytes]]

    def copy(self, task: messages.Compacting, fds: Sequence[int]) -> None:
        """Make the moves of a task and check them; its fds are closed, and nothing stays mapped."""
        copies = [Copy(move.source, move.start, move.offset, move.nbytes) for move in task.moves]
        mappings: list[Mapping] = []
        try:
            for segment, fd in zip((task.target, *task.sources), fds, strict=True):
                mappings.append(Mapping(self.backend, self.backend.import_fd(fd, segment.nbytes)))
            target, *sources = mappings
            copy_blobs(sources, target, copies, self.copy_bytes)
            self.settle()
            found = self.digests([(target.address + move.offset, move.nbytes) for move in task.moves])
        finally:
            close_all(mappings)
        for move, digest in zip(task.moves, found, strict=True):
            if digest != move.digest:
                raise DigestMismatchError(
                    f"the copy of blob {move.digest.hex()[:16]} has digest {digest.hex()[:16]}: nothing was changed; "
                    "`wooly verify --all` finds out whether the blob itself is wrong"
                )


@contextmanager
def _worker(backend: Backend) -> Iterator[_Worker]:
    if backend.ordinal is None:
        yield _Worker(backend, copy_host, lambda: None, lambda spans: [digest_at(*span) for span in spans])
        return
    from shared_store.memory.cuda.blob_copy import DeviceCopies
    from shared_store.memory.cuda.digests import CudaDigests

    copies = DeviceCopies(backend.ordinal)
    try:
        yield _Worker(backend, copies.copy, copies.settle, CudaDigests(backend.ordinal).digest_many)
    finally:
        copies.close()
