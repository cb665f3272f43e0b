"""KV blocks of vLLM's scheduler: which have contents, and which of these are kept in a swap. No memory is touched.

Relies on the block pool of vLLM 0.26 and later: ``blocks`` by id, one of them the null block; ``ref_cnt``;
``block_hash``; ``free_block_queue``, whose order is the order of eviction; ``evict_blocks``. A block id belongs to one
group of layers at a time, and means the same bytes in the cache of every worker.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kept:
    """Blocks to save in a swap.

    Attributes:
        ids: sorted.
        running: number of those that requests use.
        dropped: cached blocks that are not saved, and whose hashes must go: :func:`drop`. Sorted.
    """

    ids: list[int]
    running: int
    dropped: list[int]


def choose(pool: Any, most: int) -> Kept:
    """Choose the blocks to save: all that requests use, and cached prefixes, newest first, up to ``most`` in all.

    ``ids`` has more than ``most`` blocks if requests use more.
    """
    used, cached = used_ids(pool), prefix_ids(pool)
    room = max(0, most - len(used))
    return Kept(sorted([*used, *cached[:room]]), len(used), sorted(cached[room:]))


def used_ids(pool: Any) -> list[int]:
    """Return the ids of blocks that requests use, sorted, without the null block."""
    return [block.block_id for block in pool.blocks if block.ref_cnt > 0 and not block.is_null]


def prefix_ids(pool: Any) -> list[int]:
    """Return the ids of blocks with a cached prefix that no request uses, newest first."""
    free = pool.free_block_queue.get_all_free_blocks()
    return [block.block_id for block in reversed(free) if block.block_hash is not None and not block.is_null]


def drop(pool: Any, block_ids: Collection[int]) -> None:
    """Remove the hashes of blocks, so that no request finds them as a prefix. Emits vLLM's KV events."""
    if block_ids:
        pool.evict_blocks(set(block_ids))


def drop_all(pool: Any) -> None:
    """Remove every hash, those of running requests' blocks too: the contents of all blocks are gone."""
    drop(pool, [block.block_id for block in pool.blocks if block.block_hash is not None])
