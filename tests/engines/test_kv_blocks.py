"""The choice of KV blocks to save, on vLLM's own block pool."""

from __future__ import annotations

from typing import Any

import pytest

from wooly_vllm.residency import blocks

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what vLLM imports
]


@pytest.fixture
def pool() -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=12, enable_caching=True, hash_block_size=16, enable_kv_cache_events=True)


def cached(pool: Any, count: int) -> list[Any]:
    """Take blocks and give each a hash, as those of a request's prefix."""
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    taken: list[Any] = pool.get_new_blocks(count)
    for block in taken:
        key = make_block_hash_with_group_id(BlockHash(f"hash {block.block_id}".encode()), 0)
        if hasattr(block, "set_block_hash"):  # 0.32 and later
            block.set_block_hash(key, num_tokens=16)
        else:
            block.block_hash = key
        pool.cached_block_hash_to_block.insert(key, block)
    return taken


def ids(taken: list[Any]) -> list[int]:
    return [block.block_id for block in taken]


def test_an_empty_pool_keeps_nothing(pool: Any) -> None:
    assert blocks.choose(pool, 100) == blocks.Kept([], 0, [])


def test_blocks_in_use_are_kept_whatever_the_limit(pool: Any) -> None:
    running = pool.get_new_blocks(3)
    assert blocks.choose(pool, 0) == blocks.Kept(sorted(ids(running)), 3, [])


def test_newest_prefixes_are_kept_and_the_oldest_dropped(pool: Any) -> None:
    """Of one request the blocks at its beginning: vLLM frees the last first."""
    old, new, running = cached(pool, 2), cached(pool, 3), cached(pool, 1)
    pool.free_blocks(reversed(old))
    pool.free_blocks(reversed(new))
    assert blocks.prefix_ids(pool) == [*ids(new), *ids(old)]
    kept = blocks.choose(pool, 3)
    assert kept == blocks.Kept(sorted([*ids(running), *ids(new)[:2]]), 1, sorted([ids(new)[2], *ids(old)]))


def test_dropped_blocks_lose_their_hash_and_are_reported(pool: Any) -> None:
    taken = cached(pool, 3)
    hashes = [block.block_hash for block in taken]
    pool.free_blocks(reversed(taken))
    blocks.drop(pool, ids(taken)[1:])
    assert blocks.prefix_ids(pool) == [taken[0].block_id]
    assert [pool.cached_block_hash_to_block.get_one_block(key) is None for key in hashes] == [False, True, True]
    assert len(pool.take_events()) == 2
    assert pool.get_num_free_blocks() == 11


def test_all_hashes_can_be_dropped_those_of_running_requests_too(pool: Any) -> None:
    running, free = cached(pool, 2), cached(pool, 2)
    pool.free_blocks(reversed(free))
    blocks.drop_all(pool)
    assert blocks.choose(pool, 100) == blocks.Kept(sorted(ids(running)), 2, [])
    assert all(block.block_hash is None for block in pool.blocks)
