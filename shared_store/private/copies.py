"""Copies of memory that left its device: in host memory, or in a swap file whose bytes are checked when they return.

A copy is written from its first byte to its last, in pieces, and read in the same pieces, as often as needed. Pieces of
host memory stay where they are, so that a device may copy to them while the next ones are filled. Those of a file pass
through one buffer: each is complete before the next.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from shared_store.base.digest import digest
from shared_store.base.errors import DigestMismatchError, DiskError
from shared_store.private.arena import Arena
from shared_store.runtime import swap_files

PIECE_BYTES: Final = 32 << 20
"""Most bytes of one piece, unless one row of memory is larger."""


class Copy(ABC):
    """Bytes that left a device. Not thread-safe."""

    in_place: bool
    """True if pieces stay valid until :meth:`close`, and are the copy itself."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._read = 0

    @property
    def nbytes(self) -> int:
        """Bytes that were written."""
        return sum(self._sizes)

    def append(self, nbytes: int) -> memoryview:
        """Return the next piece, which the caller fills. If not :attr:`in_place`, then :meth:`wrote` follows.

        Raises:
            OutOfMemoryError: host memory ends.
        """
        self._sizes.append(nbytes)
        return self._piece(nbytes)

    @abstractmethod
    def wrote(self) -> None:
        """Store the piece that was filled last. Raises :class:`DiskError`."""

    def rewind(self) -> None:
        """Continue reading with the first piece."""
        self._read = 0

    def next(self) -> memoryview:
        """Return the next piece, filled. If not :attr:`in_place`, it is valid until the next call.

        Raises:
            DigestMismatchError: the bytes are not those that were written.
            DiskError: they cannot be read.
        """
        number, self._read = self._read, self._read + 1
        return self._load(number, self._sizes[number])

    @abstractmethod
    def close(self) -> None:
        """Free the copy. Idempotent. No piece may be in use."""

    @abstractmethod
    def _piece(self, nbytes: int) -> memoryview:
        """Return memory for the last piece of ``_sizes``."""

    @abstractmethod
    def _load(self, number: int, nbytes: int) -> memoryview:
        """Return a piece that was written."""


class HostCopy(Copy):
    """A copy in an arena, of which it is the only user."""

    in_place = True

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self._end = (0, 0)
        self._pieces: list[memoryview] = []

    def _piece(self, nbytes: int) -> memoryview:
        piece, self._end = self._arena.part(nbytes, self._end)
        self._pieces.append(piece)
        return piece

    def wrote(self) -> None:  # noqa: D102 - documented by the interface
        return

    def _load(self, number: int, nbytes: int) -> memoryview:  # noqa: ARG002 - the interface's
        return self._pieces[number]

    def close(self) -> None:  # noqa: D102 - documented by the interface
        self._pieces.clear()
        self._sizes.clear()
        self._end = (0, 0)


class FileCopy(Copy):
    """A copy in a swap file. The digest of each piece stays in memory."""

    in_place = False

    def __init__(self, directory: Path, nbytes: int) -> None:
        """Make a file with space for ``nbytes`` bytes.

        Raises:
            DiskError: the disk is full, or the file system refuses.
        """
        super().__init__()
        self._fd = swap_files.create(directory, nbytes)
        self._buffer: mmap.mmap | None = None
        self._digests: list[bytes] = []
        self._offsets: list[int] = []

    def _piece(self, nbytes: int) -> memoryview:
        if self._buffer is None or len(self._buffer) < nbytes:
            self._buffer = mmap.mmap(-1, max(nbytes, PIECE_BYTES))
            self._buffer.madvise(mmap.MADV_DONTDUMP)
        return memoryview(self._buffer)[:nbytes]

    def wrote(self) -> None:  # noqa: D102 - documented by the interface
        piece = self._piece(self._sizes[-1])
        self._offsets.append(sum(self._sizes[:-1]))
        self._digests.append(digest(piece))
        offset, done = self._offsets[-1], 0
        try:
            while done < piece.nbytes:
                done += os.pwrite(self._fd.fileno(), piece[done:], offset + done)
        except OSError as error:
            raise DiskError(f"cannot write to a swap file: {error.strerror}; free disk space") from error

    def _load(self, number: int, nbytes: int) -> memoryview:
        piece, done = self._piece(nbytes), 0
        try:
            while done < nbytes:
                count = os.preadv(self._fd.fileno(), [piece[done:]], self._offsets[number] + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise DiskError(f"cannot read a swap file: {error.strerror}; check the disk") from error
        if done < nbytes or digest(piece) != self._digests[number]:
            raise DigestMismatchError("a swap file has other bytes than were written to it; check the disk")
        return piece

    def close(self) -> None:  # noqa: D102 - documented by the interface
        self._fd.close()
        self._buffer = None
