"""Copiers: copy a device's memory from and to files, and digest it.

Relies on reads, writes, digests and driver calls releasing Python's global interpreter lock while they work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias

from shared_store.base.digest import digest_at
from shared_store.memory import Backend
from shared_store.memory.registry import transfer_for
from shared_store.memory.transfer import BUFFER_BYTES, Transfer
from shared_store.memory.transfer import Lane as TransferLane
from shared_store.transfer.files import OpenFile

PIECE_BYTES: Final = BUFFER_BYTES
"""Most bytes of one copy: enough to keep a disk busy, few enough to divide a model evenly between threads."""

_MOST_THREADS: Final = 16

Span: TypeAlias = tuple[int, int]
"""An address and a number of bytes."""

Progress: TypeAlias = Callable[[int], None]
"""Called with the bytes done since the last call, from any thread."""


def ignore_progress(_: int) -> None:
    """Do nothing: the progress callback of calls that report none."""


def threads() -> int:
    """Return the number of copying threads: one per core, at most 16. More do not make a GPU's bus faster."""
    return min(_MOST_THREADS, os.cpu_count() or 1)


@dataclass(frozen=True)
class Piece:
    """A range of a file and the range of memory that it is copied to or from; ``offset`` and ``nbytes`` in bytes."""

    file: OpenFile
    offset: int
    address: int
    nbytes: int

    def parts(self) -> Iterator[Piece]:
        """Divide the piece into pieces of at most :data:`PIECE_BYTES`."""
        for done in range(0, self.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, self.nbytes - done)
            yield Piece(self.file, self.offset + done, self.address + done, nbytes)


class Lane:
    """The copies of one thread. Pieces have at most :data:`PIECE_BYTES`."""

    def __init__(self, lane: TransferLane) -> None:
        self._lane = lane

    def load(self, piece: Piece) -> None:
        """Copy from the file to memory. The copy may still be in progress on return."""
        self._lane.copy_in(piece.address, piece.nbytes, lambda view: piece.file.read(piece.offset, view))

    def save(self, piece: Piece) -> None:
        """Copy from memory to the file. The copy is complete on return."""
        self._lane.copy_out(piece.address, piece.nbytes, lambda view: piece.file.write(piece.offset, view))


@dataclass(frozen=True)
class Copier:
    """Copies and digests the memory of one device.

    Attributes:
        transfer: copies between the device and the host.
        digests: returns the BLAKE3-256 digest of each span of mapped memory, in their order, and reports bytes done.
    """

    transfer: Transfer
    digests: Callable[[Sequence[Span], Progress], list[bytes]]

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """Open a lane for the calling thread. Its copies are complete when the block ends without an error."""
        with self.transfer.lane() as lane:
            yield Lane(lane)


@contextlib.contextmanager
def copier_for(backend: Backend) -> Iterator[Copier]:
    """Make the copier of a backend's device, and close it after the block.

    The calling thread may map the device's memory while the block runs.

    Raises:
        UnknownDeviceError: the device is a GPU, and there is no driver, or no cuda-bindings.
        OutOfMemoryError: the GPU has no memory for a context.
    """
    digests = _host_digests if backend.ordinal is None else _gpu_digests(backend.ordinal)
    with transfer_for(backend) as transfer:
        yield Copier(transfer, digests)


def _host_digests(spans: Sequence[Span], progress: Progress) -> list[bytes]:
    """Digest host memory with several threads."""

    def digest_span(span: Span) -> bytes:
        found = digest_at(*span)
        progress(span[1])
        return found

    with ThreadPoolExecutor(threads(), thread_name_prefix="wooly-digest") as pool:
        return list(pool.map(digest_span, spans))


def _gpu_digests(ordinal: int) -> Callable[[Sequence[Span], Progress], list[bytes]]:
    """Return a function that digests all spans of a GPU's memory in place, with one call."""
    from shared_store.memory.cuda.digests import CudaDigests

    hasher = CudaDigests(ordinal)

    def digests(spans: Sequence[Span], progress: Progress) -> list[bytes]:
        found = hasher.digest_many(spans)
        progress(sum(nbytes for _, nbytes in spans))
        return found

    return digests
