"""What this process can do with a device's memory: copy it to and from files, and digest it. One class a device.

Relies on reads, writes, digests and the driver's calls letting go of Python's global lock while they work.
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
from shared_store.memory.cuda.digests import CudaDigests
from shared_store.memory.cuda.transfer import CudaTransfer
from shared_store.memory.transfer import BUFFER_BYTES
from shared_store.memory.transfer import Lane as TransferLane
from shared_store.transfer.files import OpenFile

PIECE_BYTES: Final = BUFFER_BYTES
"""Most that is copied in one step: enough to keep a disk busy, little enough to divide a model evenly."""

_MOST_THREADS: Final = 16

Span: TypeAlias = tuple[int, int]
"""An address and a number of bytes."""

Progress: TypeAlias = Callable[[int], None]
"""Called with bytes done since the last call, from any thread."""


def unheard(_: int) -> None:
    """The progress that nobody watches."""


def threads() -> int:
    """How many threads copy at a time: one a core, at most 16, beyond which a GPU's bus gains nothing."""
    return min(_MOST_THREADS, os.cpu_count() or 1)


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file, and where they are in memory."""

    file: OpenFile
    offset: int
    address: int
    nbytes: int

    def parts(self) -> Iterator[Piece]:
        """The same in pieces of at most :data:`PIECE_BYTES`."""
        for done in range(0, self.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, self.nbytes - done)
            yield Piece(self.file, self.offset + done, self.address + done, nbytes)


class Lane(ABC):
    """What one thread copies with; pieces have at most :data:`PIECE_BYTES`."""

    @abstractmethod
    def load(self, piece: Piece) -> None:
        """From the file to memory. May still be under way on return."""

    @abstractmethod
    def save(self, piece: Piece) -> None:
        """From memory to the file."""


class Copier(ABC):
    """Copies and digests of one device's memory. To be closed."""

    @abstractmethod
    def current(self) -> contextlib.AbstractContextManager[None]:
        """In the block, the calling thread may map the device's memory."""

    @abstractmethod
    def lane(self) -> contextlib.AbstractContextManager[Lane]:
        """A lane for the calling thread; what it began is over when the block ends well."""

    @abstractmethod
    def digests(self, spans: Sequence[Span], progress: Progress = unheard) -> list[bytes]:
        """BLAKE3-256 of mapped memory, in the order of the spans."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


class HostCopier(Copier):
    """Host memory: files are read into it and written from it with no buffer between."""

    def current(self) -> contextlib.AbstractContextManager[None]:  # noqa: D102 - the interface's
        return contextlib.nullcontext()

    def lane(self) -> contextlib.AbstractContextManager[Lane]:  # noqa: D102 - the interface's
        return contextlib.nullcontext(_HostLane())

    def digests(self, spans: Sequence[Span], progress: Progress = unheard) -> list[bytes]:  # noqa: D102
        def one(span: Span) -> bytes:
            found = digest_at(*span)
            progress(span[1])
            return found

        with ThreadPoolExecutor(threads(), thread_name_prefix="wooly-digest") as pool:
            return list(pool.map(one, spans))

    def close(self) -> None:  # noqa: D102 - the interface's
        return


class _HostLane(Lane):
    def load(self, piece: Piece) -> None:
        piece.file.read(piece.offset, _memory(piece))

    def save(self, piece: Piece) -> None:
        piece.file.write(piece.offset, _memory(piece))


def _memory(piece: Piece) -> memoryview:
    return memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")


class GpuCopier(Copier):
    """A GPU's memory: copied through pinned buffers, and digested where it lies, all of it in one call."""

    def __init__(self, ordinal: int) -> None:
        """``ordinal``: the GPU's number in this process. Raises :class:`UnsupportedError` without CuPy."""
        self._digests = CudaDigests(ordinal)
        self._copies = CudaTransfer(ordinal)

    def current(self) -> contextlib.AbstractContextManager[None]:  # noqa: D102 - the interface's
        return self._copies.current()

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:  # noqa: D102 - the interface's
        with self._copies.lane() as lane:
            yield _GpuLane(lane)

    def digests(self, spans: Sequence[Span], progress: Progress = unheard) -> list[bytes]:  # noqa: D102
        found = self._digests.digest_many(spans)
        progress(sum(nbytes for _, nbytes in spans))
        return found

    def close(self) -> None:  # noqa: D102 - the interface's
        self._copies.close()


class _GpuLane(Lane):
    def __init__(self, lane: TransferLane) -> None:
        self._lane = lane

    def load(self, piece: Piece) -> None:
        self._lane.copy_in(piece.address, piece.nbytes, lambda view: piece.file.read(piece.offset, view))

    def save(self, piece: Piece) -> None:
        self._lane.copy_out(piece.address, piece.nbytes, lambda view: piece.file.write(piece.offset, view))


@contextlib.contextmanager
def copier_for(backend: Backend) -> Iterator[Copier]:
    """The copier of a backend's device, for a block in which the calling thread may map its memory."""
    copier = HostCopier() if backend.ordinal is None else GpuCopier(backend.ordinal)
    try:
        with copier.current():
            yield copier
    finally:
        copier.close()
