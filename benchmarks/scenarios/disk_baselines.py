"""Baselines of the benchmark ``disk``: reading, copying and writing the same bytes, without wooly.

Each uses as many threads as wooly's copier, and the same piece size.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness.figures import MIB, seconds
from shared_store.transfer.copier import PIECE_BYTES, threads

Piece = tuple[int, int, int]
"""Descriptor, offset and length of a part of a file."""


def pread(files: Iterable[Path]) -> float:
    """Read all bytes of files into reused buffers; return the duration in seconds."""
    return _with_pieces(files, lambda pieces: _for_each(pieces, _pread))


def pread_new(files: Iterable[Path]) -> float:
    """Read all bytes of files into new memory, whose pages are faulted in meanwhile; return the duration in seconds."""
    return _with_pieces(files, _read_into_new_memory)


def write(target: Path, nbytes: int) -> float:
    """Write and ``fsync`` a file, then remove it; return the duration of the first two in seconds."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        pieces = [(fd, at, min(PIECE_BYTES, nbytes - at)) for at in range(0, nbytes, PIECE_BYTES)]

        def write_all() -> None:
            _for_each(pieces, _pwrite)
            os.fsync(fd)

        return seconds(write_all)
    finally:
        os.close(fd)
        target.unlink()


def memcpy(nbytes: int) -> float:
    """Copy host memory, 64 MiB at a time; return the duration for ``nbytes`` in seconds."""
    count, step = threads(), 64 * MIB
    buffers = [(ctypes.create_string_buffer(step), ctypes.create_string_buffer(step)) for _ in range(count)]
    for source, target in buffers:  # touch all pages, so that none is faulted in later
        ctypes.memset(source, 1, step)
        ctypes.memset(target, 2, step)
    times = nbytes // step

    def work(number: int) -> None:
        source, target = buffers[number]
        for _ in range(number, times, count):
            ctypes.memmove(target, source, step)

    with ThreadPoolExecutor(count) as pool:
        took = seconds(lambda: list(pool.map(work, range(count))))
    return took * nbytes / (times * step)


def _with_pieces(files: Iterable[Path], measure: Callable[[list[Piece]], float]) -> float:
    fds = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]
    try:
        sizes = [os.fstat(fd).st_size for fd in fds]
        return measure(
            [
                (fd, offset, min(PIECE_BYTES, size - offset))
                for fd, size in zip(fds, sizes, strict=True)
                for offset in range(0, size, PIECE_BYTES)
            ]
        )
    finally:
        for fd in fds:
            os.close(fd)


def _for_each(pieces: list[Piece], call: Callable[[bytearray, int, int, int], None]) -> float:
    count = threads()

    def work(number: int) -> None:
        buffer = bytearray(os.urandom(4096) * (PIECE_BYTES // 4096))
        for piece in pieces[number::count]:
            call(buffer, *piece)

    with ThreadPoolExecutor(count) as pool:
        return seconds(lambda: list(pool.map(work, range(count))))


def _pread(buffer: bytearray, fd: int, offset: int, nbytes: int) -> None:
    os.preadv(fd, [memoryview(buffer)[:nbytes]], offset)


def _pwrite(buffer: bytearray, fd: int, offset: int, nbytes: int) -> None:
    os.pwritev(fd, [memoryview(buffer)[:nbytes]], offset)


def _read_into_new_memory(pieces: list[Piece]) -> float:
    count = threads()
    starts = [0]
    for _, _, nbytes in pieces:
        starts.append(starts[-1] + nbytes)

    def work(number: int) -> None:
        for (fd, offset, nbytes), at in zip(pieces[number::count], starts[number::count], strict=False):
            os.preadv(fd, [view[at : at + nbytes]], offset)

    with mmap.mmap(-1, starts[-1]) as memory, memoryview(memory) as view, ThreadPoolExecutor(count) as pool:
        return seconds(lambda: list(pool.map(work, range(count))))
