"""KV blocks of vLLM's scheduler: which have contents, and which of these are kept in a swap. No memory is touched.

Relies on the block pool of vLLM 0.26 and later: ``blocks`` by id, of which the null block is the first; ``ref_cnt``;
``block_hash``; ``free_block_queue``, whose order is the order of eviction; ``evict_blocks``. A block id belongs to one
group of layers at a time, and means the same bytes in the cache of every worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kept:
    """Blocks to save in a swap.

    Attributes:
        ids: sorted.
        running: number of those that requests use.
        dropped: cached blocks that are not saved, and whose hashes must go: :func:`drop`.
    """

    ids: list[int]
    running: int
    dropped: list[int]


def choose(pool: Any, most: int) -> Kept:
    """Choose the blocks to save: all that requests use, and cached prefixes, newest first, up to ``most`` in all."""
    raise NotImplementedError


def used_ids(pool: Any) -> list[int]:
    """Return the ids of blocks that requests use, sorted, without the null block."""
    raise NotImplementedError


def prefix_ids(pool: Any) -> list[int]:
    """Return the ids of blocks with a cached prefix that no request uses, newest first."""
    raise NotImplementedError


def drop(pool: Any, block_ids: Sequence[int]) -> None:
    """Remove the hashes of blocks, so that no request finds them as a prefix. Emits vLLM's KV events."""
    raise NotImplementedError
