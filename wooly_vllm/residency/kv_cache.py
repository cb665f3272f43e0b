"""The KV cache of a worker in ranges of private memory, and the bytes of each of its blocks.

vLLM allocates its cache by ``torch.zeros`` of so many bytes: one tensor for each ``KVCacheTensor`` until 0.28, one for
all of them afterwards. While a worker allocates its real cache, these calls return memory of ranges. Profiling, which
allocates caches for a moment, is not touched.

A block is a row of a few tables, see :class:`~.rows.Rows`. They are derived from vLLM's description of the cache and
then checked: every byte belongs to one block, and every layer's view of a block lies in that block's rows. Where the
check fails the cache is not swappable, and says why.

Relies on block ids being those of the scheduler: kernels may divide a block, but never move it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from shared_store.base.errors import UnsupportedError
from shared_store.private.ranges import PrivateMemory
from shared_store.torch.views import bytes_in, storage_of
from wooly_vllm.residency.rows import Rows


class Allocating(TorchFunctionMode):
    """Within the block, this thread's ``torch.zeros`` of a KV cache allocates from private memory.

    Attributes:
        allocated: the bytes behind each tensor, in order: uint8, shape ``(nbytes,)``, a little longer than the tensor.
    """

    def __init__(self, memory: PrivateMemory, kv_cache_config: Any) -> None:
        super().__init__()
        self.allocated: list[torch.Tensor] = []
        self._memory = memory
        self._sizes = {int(tensor.size) for tensor in kv_cache_config.kv_cache_tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Allocate, or call the function."""
        given = kwargs or {}
        if func is torch.zeros and given.get("dtype") is torch.int8:
            size = args[0] if args else None
            if isinstance(size, int) and size in self._sizes:
                return self._zeros(size)
        return func(*args, **given)

    def _zeros(self, nbytes: int) -> torch.Tensor:
        found = bytes_in(storage_of(self._memory.allocate(nbytes)))
        if not self._memory.backend.zeroed:
            found.zero_()
        self.allocated.append(found)
        return found[:nbytes].view(torch.int8)


def cache_bytes(kv_cache_config: Any) -> int:
    """Return the bytes that vLLM allocates for a cache."""
    sizes = [int(tensor.size) for tensor in kv_cache_config.kv_cache_tensors]
    # Since 0.29 there is one allocation for all; before that for those that are packed, which have a block stride.
    one_for_all = any(
        hasattr(tensor, "layer_stride") or getattr(tensor, "block_stride", 0) > 0
        for tensor in kv_cache_config.kv_cache_tensors
    )
    return max(sizes, default=0) if one_for_all else sum(sizes)


def blocks_of(kv_cache_config: Any, allocated: Sequence[torch.Tensor]) -> list[Rows]:
    """Return the tables in which the row ``b`` is block ``b``.

    Raises:
        UnsupportedError: the cache has a layout in which this cannot be told.
    """
    tensors, count = kv_cache_config.kv_cache_tensors, kv_cache_config.num_blocks
    if any(getattr(tensor, "host_resident", False) for tensor in tensors):
        raise UnsupportedError("a part of the KV cache is in host memory")
    if not tensors:
        return []
    if hasattr(tensors[0], "layer_stride"):
        if len(allocated) != 1:
            raise UnsupportedError(f"the KV cache has {len(allocated)} allocations, where one was expected")
        size = int(tensors[0].size)
        found = {it for tensor in tensors for it in _tables(tensor, count)}
        rows = [Rows(allocated[0], start, stride, stride, count) for start, stride in sorted(found)]
        _check_covered(rows, size)
        return rows
    if len(allocated) not in (1, len(tensors)):
        raise UnsupportedError(f"the KV cache has {len(allocated)} allocations for {len(tensors)} tensors")
    return [_whole(memory, int(tensor.size), count) for memory, tensor in zip(allocated, tensors, strict=False)]


def _tables(tensor: Any, count: int) -> Iterator[tuple[int, int]]:
    """Return first byte and stride of the tables of a ``KVCacheTensor`` (0.29 and later).

    With layers outermost each layer is a table. With blocks outermost all layers are in one, whose rows have other
    tensors of the cache, too.
    """
    stride, layer = int(tensor.block_stride), int(tensor.layer_stride)
    if layer >= stride * count:
        for number in range(len(tensor.layers)):
            yield int(tensor.offset) + number * layer, stride
    else:
        yield int(tensor.offset) // stride * stride, stride


def _whole(memory: torch.Tensor, size: int, count: int) -> Rows:
    """Return the table of a tensor whose blocks follow one another."""
    if size % count:
        raise UnsupportedError(f"a KV cache tensor of {size} bytes is not divided evenly into {count} blocks")
    return Rows(memory, 0, size // count, size // count, count)


def _check_covered(rows: Sequence[Rows], size: int) -> None:
    """Raise :class:`UnsupportedError` unless every byte is in one table."""
    end = 0
    for table in rows:
        if table.start != end:
            raise UnsupportedError(
                f"bytes {min(end, table.start)} to {max(end, table.start)} of the KV cache are unclear"
            )
        end += table.stride * table.count
    if end != size:
        raise UnsupportedError(f"the blocks have {end} bytes of a KV cache of {size}")


def check_views(rows: Sequence[Rows], views: Iterable[torch.Tensor]) -> None:
    """Check that each view of the cache has the first and the last block in their rows.

    Args:
        rows: of all blocks.
        views: tensors over the cache that layers use; others are left out.

    Raises:
        UnsupportedError: a view has a block elsewhere.
    """
    for view in views:
        memory = next((table.memory for table in rows if _inside(view, table.memory)), None)
        if memory is None:
            continue
        tables = [table for table in rows if table.memory is memory]
        if not any(_in_rows(view, dimension, memory, tables) for dimension in range(view.dim())):
            raise UnsupportedError(
                f"a KV cache of shape {tuple(view.shape)} and strides {view.stride()} does not have each block in one "
                "place"
            )


def _inside(view: torch.Tensor, memory: torch.Tensor) -> bool:
    offset = view.data_ptr() - memory.data_ptr()
    return bool(view.numel()) and 0 <= offset < memory.numel()


def _in_rows(view: torch.Tensor, dimension: int, memory: torch.Tensor, tables: Sequence[Rows]) -> bool:
    """Return True if a dimension of a view numbers blocks, or equal parts of them, as the tables do."""
    count, length = tables[0].count, view.shape[dimension]
    if length % count:
        return False
    per_block = length // count
    return all(
        any(
            _contains(table, block, *_extent(view.narrow(dimension, block * per_block, per_block), memory))
            for table in tables
        )
        for block in {0, count - 1}
    )


def _extent(part: torch.Tensor, memory: torch.Tensor) -> tuple[int, int]:
    """Return first byte of a tensor in memory, and the byte after its last."""
    first = part.data_ptr() - memory.data_ptr()
    span = sum((length - 1) * step for length, step in zip(part.shape, part.stride(), strict=True))
    return first, first + (span + 1) * part.element_size()


def _contains(table: Rows, number: int, first: int, end: int) -> bool:
    start = table.start + number * table.stride
    return start <= first and end <= start + table.nbytes
