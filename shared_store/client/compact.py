"""Compaction by a client, for device memory that the store cannot read: copy blobs to the segments that it plans.

Needs no torch. On a GPU it needs cuda-bindings. Every copy is verified on its device before
the store switches to it; in host memory the store verifies it again.

A client that ends in the middle changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from shared_store.base.digest import digest_at
from shared_store.base.errors import DigestMismatchError
from shared_store.client.session import Session
from shared_store.memory import Backend, Mapping, backend_for
from shared_store.memory.mapping import close_all
from shared_store.memory.registry import transfer_for
from shared_store.memory.transfer import Copy, Transfer, copy_blobs
from shared_store.protocol import messages


class Compacted(NamedTuple):
    """The result of compacting a device: new segments, bytes that were copied to them, and bytes that were freed."""

    device: str
    segments: int
    moved_bytes: int
    freed_bytes: int


def compact(session: Session, device: str, backend: Backend | None = None) -> Compacted:
    """Compact a device, segment by segment, until nothing more would be freed.

    Args:
        session: the connection.
        device: the store's name of the device.
        backend: of the device; None chooses it.

    Raises:
        UnknownDeviceError: the store, or this process, does not have the device.
        DigestMismatchError: a copy differs from its digest. The original may be damaged too (`wooly verify`).
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
                    break  # new readers use the old segments
                segments += 1
                moved, freed = moved + switched.moved_bytes, freed + switched.freed_bytes
                found = session.compact(device)
    return Compacted(device, segments, moved, freed)


class _Worker(NamedTuple):
    """Copies and digests memory of one device, by address."""

    backend: Backend
    transfer: Transfer
    digests: Callable[[Sequence[tuple[int, int]]], list[bytes]]

    def copy(self, task: messages.Compacting, fds: Sequence[int]) -> None:
        """Copy and verify the blobs of a task, and unmap all segments.

        Args:
            task: the store's answer.
            fds: descriptors of the target and the sources, borrowed.
        """
        copies = [Copy(move.source, move.start, move.offset, move.nbytes) for move in task.moves]
        mappings: list[Mapping] = []
        try:
            for segment, fd in zip((task.target, *task.sources), fds, strict=True):
                mappings.append(Mapping(self.backend, self.backend.import_fd(fd, segment.nbytes)))
            target, *sources = mappings
            copy_blobs(self.transfer, sources, target, copies)
            self.transfer.settle()
            found = self.digests([(target.address + move.offset, move.nbytes) for move in task.moves])
        finally:
            close_all(mappings)
        for move, digest in zip(task.moves, found, strict=True):
            if digest != move.digest:
                raise DigestMismatchError(
                    f"the copy of blob {move.digest.hex()[:16]} has digest {digest.hex()[:16]}; nothing was changed. "
                    "`wooly verify --all` checks whether the blob itself is damaged"
                )


@contextmanager
def _worker(backend: Backend) -> Iterator[_Worker]:
    with transfer_for(backend) as transfer:
        if backend.ordinal is None:
            yield _Worker(backend, transfer, lambda spans: [digest_at(*span) for span in spans])
            return
        from shared_store.memory.cuda.digests import CudaDigests

        yield _Worker(backend, transfer, CudaDigests(backend.ordinal).digest_many)
