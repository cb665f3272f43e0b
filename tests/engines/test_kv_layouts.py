"""The bytes of KV blocks, derived from vLLM's description of a cache, for every layout that vLLM describes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_store.base.errors import UnsupportedError
from shared_store.memory.fake import FakeBackend
from shared_store.private.arena import Arena
from shared_store.private.copies import FileCopy, HostCopy
from shared_store.private.ranges import PrivateMemory
from wooly_vllm.residency import rows as tables
from wooly_vllm.residency.kv_cache import Allocating, blocks_of, cache_bytes, check_views
from wooly_vllm.residency.rows import Rows

BLOCKS = 6


def cache_of(*tensors: dict[str, Any], blocks: int = BLOCKS) -> Any:
    return SimpleNamespace(num_blocks=blocks, kv_cache_tensors=[SimpleNamespace(**tensor) for tensor in tensors])


def layers_outermost(page: int, layers: int, offset: int = 0, size: int = 0) -> dict[str, Any]:
    stride = page * BLOCKS
    return {
        "size": size or stride * layers,
        "layers": [str(n) for n in range(layers)],
        "layer_stride": stride,
        "block_stride": page,
        "offset": offset,
    }


def blocks_outermost(page: int, layers: int, stride: int = 0, offset: int = 0) -> dict[str, Any]:
    stride = stride or page * layers
    return {
        "size": stride * BLOCKS,
        "layers": [str(n) for n in range(layers)],
        "layer_stride": page,
        "block_stride": stride,
        "offset": offset,
    }


def bytes_of(nbytes: int) -> torch.Tensor:
    return torch.arange(nbytes, dtype=torch.int64).remainder(251).to(torch.uint8)


def test_with_layers_outermost_each_layer_is_a_table() -> None:
    rows = blocks_of(cache_of(layers_outermost(64, 3)), [bytes_of(64 * 3 * BLOCKS)])
    assert [(row.start, row.stride, row.nbytes) for row in rows] == [(n * 64 * BLOCKS, 64, 64) for n in range(3)]


def test_with_blocks_outermost_all_layers_are_one_table() -> None:
    """Layers of another kind in the same block too."""
    stride = 64 * 3 + 32 * 2
    tensors = (blocks_outermost(64, 3, stride), blocks_outermost(32, 2, stride, offset=64 * 3))
    (row,) = blocks_of(cache_of(*tensors), [bytes_of(stride * BLOCKS)])
    assert (row.start, row.stride, row.nbytes) == (0, stride, stride)


def test_groups_that_overlay_each_other_are_one_table() -> None:
    rows = blocks_of(cache_of(layers_outermost(64, 2), layers_outermost(64, 2)), [bytes_of(64 * 2 * BLOCKS)])
    assert len(rows) == 2


def test_bytes_of_a_cache_are_those_of_its_allocations() -> None:
    assert cache_bytes(cache_of(layers_outermost(64, 2), layers_outermost(64, 2))) == 64 * 2 * BLOCKS
    assert cache_bytes(cache_of({"size": 60}, {"size": 30})) == 90
    packed = {"size": 90 * BLOCKS, "block_stride": 90}  # until 0.28, in one allocation
    assert cache_bytes(cache_of(packed, packed)) == 90 * BLOCKS
    (row,) = blocks_of(cache_of(packed, packed), [bytes_of(90 * BLOCKS)])
    assert (row.start, row.stride, row.nbytes) == (0, 90, 90)
    assert cache_bytes(cache_of()) == 0


def test_one_allocation_for_each_tensor_is_a_table_each() -> None:
    """As in vLLM until 0.28."""
    rows = blocks_of(cache_of({"size": 60 * BLOCKS}, {"size": 30 * BLOCKS}), [bytes_of(400), bytes_of(200)])
    assert [(row.start, row.stride) for row in rows] == [(0, 60), (0, 30)]


@pytest.mark.parametrize(
    ("tensors", "allocations", "reason"),
    [
        ([layers_outermost(64, 2, size=64 * 2 * BLOCKS + 64)], 1, "blocks have"),
        ([layers_outermost(64, 1, offset=64, size=64 * BLOCKS)], 1, "are unclear"),
        ([layers_outermost(64, 2, size=999), layers_outermost(32, 1, size=999)], 1, "are unclear"),
        ([layers_outermost(64, 2)], 2, "allocations"),
        ([{"size": 64 * BLOCKS + 1}], 1, "not divided evenly"),
        ([{"size": 64}, {"size": 64}, {"size": 64}], 2, "allocations"),
        ([{**layers_outermost(64, 2), "host_resident": True}], 1, "in host memory"),
    ],
)
def test_a_cache_in_which_blocks_cannot_be_told_is_refused(tensors: Any, allocations: int, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        blocks_of(cache_of(*tensors), [bytes_of(1000)] * allocations)


def test_views_of_blocks_in_their_rows_are_accepted() -> None:
    """Blocks first, blocks divided for kernels, strides over padding, and views of other memory."""
    memory = bytes_of(64 * 2 * BLOCKS)
    rows = blocks_of(cache_of(layers_outermost(64, 2)), [memory])
    second = memory[64 * BLOCKS :]
    views = [
        second.view(BLOCKS, 2, 32),
        second.view(BLOCKS * 2, 32),
        second.view(torch.bfloat16).view(BLOCKS, 32).transpose(0, 1),
        second.as_strided((BLOCKS, 40), (64, 1), second.storage_offset()),
        torch.zeros(BLOCKS, 2, 32),
    ]
    check_views(rows, views)


@pytest.mark.parametrize(
    "view",
    [
        lambda memory: memory.view(2, BLOCKS, 64),  # keys in one half, values in the other
        lambda memory: memory[: BLOCKS * 48].view(BLOCKS, 48),  # another stride
        lambda memory: memory[32:-32].view(BLOCKS * 2 - 1, 64),  # another number of blocks
    ],
)
def test_views_with_a_block_elsewhere_are_refused(view: Any) -> None:
    memory = bytes_of(64 * 2 * BLOCKS)
    rows = blocks_of(cache_of(layers_outermost(64, 2)), [memory])
    with pytest.raises(UnsupportedError, match="does not have each block in one place"):
        check_views(rows, [view(memory)])


def test_only_zeros_of_the_caches_sizes_are_allocated_from_ranges() -> None:
    memory = PrivateMemory(FakeBackend(zeroed=False))
    with Allocating(memory, cache_of({"size": 10_000}, {"size": 20_000})) as allocating:
        cache = torch.zeros(10_000, dtype=torch.int8, device="cpu")
        others = [torch.zeros(10_001, dtype=torch.int8), torch.zeros(10_000), torch.zeros((100, 100), dtype=torch.int8)]
        second = torch.zeros(20_000, dtype=torch.int8)
    torch.zeros(10_000, dtype=torch.int8)
    assert len(allocating.allocated) == 2
    assert (cache.shape, cache.dtype, int(cache.any())) == ((10_000,), torch.int8, 0)
    assert all(not other.any() for other in others)
    assert memory.nbytes == sum(it.numel() for it in allocating.allocated)
    assert [it.address for it in memory._all()] == sorted([cache.data_ptr(), second.data_ptr()])
    del cache, second, allocating
    assert memory.nbytes == 0


@pytest.mark.parametrize("kind", ["host", "file"])
@given(
    width=st.integers(1, 40),
    gap=st.integers(0, 9),
    start=st.integers(0, 9),
    chosen=st.sets(st.integers(0, 19)),
    piece=st.integers(1, 200),
)
@settings(max_examples=60)
def test_rows_return_wherever_they_are(
    tmp_path_factory: Any, kind: str, width: int, gap: int, start: int, chosen: set[int], piece: int
) -> None:
    """Other bytes stay as they are."""
    stride = width + gap
    memory = bytes_of(start + 20 * stride)
    rows = [Rows(memory, start, stride, width, 20)]
    right, ids = memory.clone(), sorted(chosen)
    copy = HostCopy(Arena(extent_bytes=1 << 20)) if kind == "host" else FileCopy(tmp_path_factory.getbasetemp(), 4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PIECE_BYTES", piece)
        tables.save(rows, ids, copy)
        assert copy.nbytes == width * len(ids)
        memory.fill_(0xFF)
        copy.rewind()
        tables.restore(rows, ids, copy)
    for number in range(20):
        first = start + number * stride
        row = memory[first : first + width]
        assert torch.equal(row, right[first : first + width]) if number in chosen else bool((row == 0xFF).all())
        assert bool((memory[first + width : first + stride] == 0xFF).all())
    copy.close()


@given(chosen=st.sets(st.integers(0, 19)), width=st.integers(1, 40), piece=st.integers(1, 200))
@settings(max_examples=30)
def test_rows_with_contents_are_found(chosen: set[int], width: int, piece: int) -> None:
    memory = torch.zeros(20 * width, dtype=torch.uint8)
    for number in chosen:
        memory[(number + 1) * width - 1] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PIECE_BYTES", piece)
        assert tables.nonzero(Rows(memory, 0, width, width, 20)) == sorted(chosen)
