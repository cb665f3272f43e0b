"""Copiers: copy a device's memory from and to files, and digest it. One class for each kind of device.

Relies on reads, writes, digests and driver calls releasing Python's global interpreter lock while they work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias

from shared_store.base.digest import digest_at
from shared_store.memory import Backend
from shared_store.memory.cuda import transfer as copies
from shared_store.memory.cuda.digests import CudaDigests
from shared_store.transfer.files import OpenFile

PIECE_BYTES: Final = copies.BUFFER_BYTES
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


class Lane(ABC):
    """The copying resources of one thread. Pieces have at most :data:`PIECE_BYTES`."""

    @abstractmethod
    def load(self, piece: Piece) -> None:
        """Copy from the file to memory. The copy may still be in progress on return."""

    @abstractmethod
    def save(self, piece: Piece) -> None:
        """Copy from memory to the file. The copy is complete on return."""


class Copier(ABC):
    """Copies and digests the memory of one device. Close it after use."""

    @abstractmethod
    def current(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which the calling thread may map the device's memory."""

    @abstractmethod
    def lane(self) -> contextlib.AbstractContextManager[Lane]:
        """Return a context manager with a lane for the calling thread.

        The lane's copies are complete when the block ends without an error.
        """

    @abstractmethod
    def digests(self, spans: Sequence[Span], progress: Progress = ignore_progress) -> list[bytes]:
        """Return the BLAKE3-256 digest of each span of mapped memory, in their order."""

    @abstractmethod
    def close(self) -> None:
        """Release the device's resources. Idempotent."""


class HostCopier(Copier):
    """Copies host memory: reads files into it and writes them from it, without a buffer."""

    def current(self) -> contextlib.AbstractContextManager[None]:  # noqa: D102 - documented in Copier
        return contextlib.nullcontext()

    def lane(self) -> contextlib.AbstractContextManager[Lane]:  # noqa: D102 - documented in Copier
        return contextlib.nullcontext(_HostLane())

    def digests(self, spans: Sequence[Span], progress: Progress = ignore_progress) -> list[bytes]:  # noqa: D102 - as above
        def digest_span(span: Span) -> bytes:
            found = digest_at(*span)
            progress(span[1])
            return found

        with ThreadPoolExecutor(threads(), thread_name_prefix="wooly-digest") as pool:
            return list(pool.map(digest_span, spans))

    def close(self) -> None:  # noqa: D102 - documented in Copier
        return


class _HostLane(Lane):
    def load(self, piece: Piece) -> None:
        piece.file.read(piece.offset, _memory(piece))

    def save(self, piece: Piece) -> None:
        piece.file.write(piece.offset, _memory(piece))


def _memory(piece: Piece) -> memoryview:
    return memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")


class GpuCopier(Copier):
    """Copies GPU memory through pinned buffers, and digests all spans in place with one call."""

    def __init__(self, ordinal: int) -> None:
        """Use the GPU with this number in this process.

        Raises:
            UnsupportedError: CuPy is not installed.
            UnknownDeviceError: there is no NVIDIA driver.
        """
        self._digests = CudaDigests(ordinal)
        self._copies = copies.GpuCopies(ordinal)

    def current(self) -> contextlib.AbstractContextManager[None]:  # noqa: D102 - documented in Copier
        return self._copies.current()

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:  # noqa: D102 - documented in Copier
        with self._copies.lane() as lane:
            yield _GpuLane(lane)

    def digests(self, spans: Sequence[Span], progress: Progress = ignore_progress) -> list[bytes]:  # noqa: D102 - as above
        found = self._digests.digest_many(spans)
        progress(sum(nbytes for _, nbytes in spans))
        return found

    def close(self) -> None:  # noqa: D102 - documented in Copier
        self._copies.close()


class _GpuLane(Lane):
    def __init__(self, lane: copies.Lane) -> None:
        self._lane = lane

    def load(self, piece: Piece) -> None:
        self._lane.copy_in(piece.address, piece.nbytes, lambda view: piece.file.read(piece.offset, view))

    def save(self, piece: Piece) -> None:
        self._lane.copy_out(piece.address, piece.nbytes, lambda view: piece.file.write(piece.offset, view))


@contextlib.contextmanager
def copier_for(backend: Backend) -> Iterator[Copier]:
    """Make the copier of a backend's device, and close it after the block.

    The calling thread may map the device's memory while the block runs.
    """
    copier = HostCopier() if backend.ordinal is None else GpuCopier(backend.ordinal)
    try:
        with copier.current():
            yield copier
    finally:
        copier.close()
