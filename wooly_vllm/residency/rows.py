"""Rows of memory that are copied off a device and back: gathered and scattered through torch.

A :class:`Rows` is a table over memory: row ``r`` has the bytes from ``start + r * stride`` on. KV blocks are rows, one
table for each layer; other memory is a table of pages.

Copies go in slices of some MiB. On a GPU a slice is gathered into a buffer on the device and copied from there: single
rows are too small for a copy each. Everything runs on the current stream, and is waited for in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch

from shared_store.private.copies import PIECE_BYTES, Copy

_WORDS: Final = ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))


@dataclass(frozen=True)
class Rows:
    """A table over memory.

    Attributes:
        memory: uint8, shape ``(nbytes,)``, contiguous.
        start: first byte of row 0.
        stride: bytes from a row to the next.
        nbytes: bytes of a row, at most ``stride``.
        count: number of rows.
    """

    memory: torch.Tensor
    start: int
    stride: int
    nbytes: int
    count: int

    def table(self) -> torch.Tensor:
        """Return a view of all rows, in the widest integers that fit: shape ``(count, nbytes / itemsize)``."""
        base = self.memory.storage_offset()
        for dtype, size in _WORDS:
            if not any(number % size for number in (self.start + base, self.stride, self.nbytes, self.memory.numel())):
                words = self.memory.view(dtype)
                start = (self.start + base) // size
                return torch.as_strided(words, (self.count, self.nbytes // size), (self.stride // size, 1), start)
        raise AssertionError("bytes fit any memory")


def save(rows: Sequence[Rows], ids: Iterable[int], copy: Copy) -> None:
    """Append the rows with these numbers to a copy, of each table in turn.

    Raises:
        OutOfMemoryError: host memory ends, or the device has none for a buffer.
        DiskError: the copy is a file, and the disk is full.
    """
    _each_table(rows, ids, copy, _save_table)


def restore(rows: Sequence[Rows], ids: Iterable[int], copy: Copy) -> None:
    """Read rows that :func:`save` appended, and write them to the same places.

    Raises:
        DigestMismatchError, DiskError: as :meth:`Copy.next`. Some rows may have been written.
    """
    _each_table(rows, ids, copy, _restore_table)


def _each_table(
    rows: Sequence[Rows],
    ids: Iterable[int],
    copy: Copy,
    move: Callable[[torch.Tensor, torch.Tensor, Copy, _Buffer], None],
) -> None:
    """Move the rows with these numbers, of each table in turn."""
    numbers = list(ids)
    if not numbers or not rows:
        return
    with _Buffer(rows[0].memory.device) as buffer:
        there = torch.tensor(numbers, dtype=torch.int64, device=buffer.device)
        for table in rows:
            move(table.table(), there, copy, buffer)
        buffer.wait()


def nonzero(rows: Rows) -> list[int]:
    """Return the numbers of the rows that have a byte other than zero."""
    table = rows.table()
    parts = [part.ne(0).any(dim=1) for part in _parts(table, max(1, PIECE_BYTES // rows.nbytes))]
    return [int(number) for number in torch.nonzero(torch.cat(parts)).flatten().tolist()]


def zero(rows: Iterable[Rows]) -> None:
    """Fill the memory behind tables with zeros, between rows too."""
    for address in {table.memory.data_ptr(): table.memory for table in rows}.values():
        address.zero_()


def _save_table(table: torch.Tensor, numbers: torch.Tensor, copy: Copy, buffer: _Buffer) -> None:
    for part in _slices(table, numbers):
        host = _tensor(copy.append(part.numel() * _row_bytes(table)), table)
        if buffer.device.type == "cpu":
            torch.index_select(table, 0, part, out=host)
        else:
            host.copy_(torch.index_select(table, 0, part, out=buffer.of(host)), non_blocking=True)
            if not copy.in_place:
                buffer.wait()
        copy.wrote()


def _restore_table(table: torch.Tensor, numbers: torch.Tensor, copy: Copy, buffer: _Buffer) -> None:
    for part in _slices(table, numbers):
        host = _tensor(copy.next(), table)
        if buffer.device.type == "cpu":
            table.index_copy_(0, part, host)
        else:
            table.index_copy_(0, part, buffer.of(host).copy_(host, non_blocking=True))
            if not copy.in_place:
                buffer.wait()


def _slices(table: torch.Tensor, numbers: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split row numbers so that a slice has at most :data:`PIECE_BYTES`."""
    return _parts(numbers, max(1, PIECE_BYTES // _row_bytes(table)))


def _parts(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    return (tensor[first : first + size] for first in range(0, tensor.shape[0], size))


def _row_bytes(table: torch.Tensor) -> int:
    return table.shape[1] * table.element_size()


def _tensor(piece: memoryview, table: torch.Tensor) -> torch.Tensor:
    """Return a piece of a copy as rows of a table."""
    return torch.frombuffer(piece, dtype=table.dtype).view(-1, table.shape[1])


class _Buffer:
    """Memory on a GPU for one slice. On a CPU there is none: rows are copied directly."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: torch.Tensor | None = None

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return memory on the device with the shape of ``rows``. What used it before is ordered by the stream."""
        nbytes = rows.numel() * rows.element_size()
        if self._memory is None or self._memory.numel() < nbytes:
            self._memory = torch.empty(max(nbytes, PIECE_BYTES), dtype=torch.uint8, device=self.device)
        return self._memory[:nbytes].view(rows.dtype).view(rows.shape)

    def wait(self) -> None:
        """Wait for the copies that were started."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory = None
