"""The devices of an engine, and the bytes that a start will allocate on them.

A start takes this memory before the workers exist, so nothing is measured yet. The estimate is not below what vLLM will
claim, as far as configuration and files tell; the store hears the right numbers when the engine has started.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from shared_store.base.errors import WoolyError
from wooly_vllm import compat
from wooly_vllm.memory import accounting
from wooly_vllm.sharing_loader import SharingLoader

GUESSED_PEAK = 2 << 30
"""Bytes of activations and graphs on a GPU, beside weights and a KV cache of a fixed size."""


def devices_of(vllm_config: Any) -> tuple[str, ...]:
    """Return the store's names of the devices of an engine's workers on this node, without touching one."""
    if compat.device_of(vllm_config).type != "cuda":
        return ("cpu",)
    return tuple(compat.uuid_of_gpu(rank) for rank in local_ranks(vllm_config.parallel_config))


def local_ranks(parallel: Any) -> range:
    """Return the numbers of an engine's devices among those of this process."""
    size = parallel.world_size // max(1, getattr(parallel, "nnodes", 1))
    replica = parallel.data_parallel_rank_local
    if replica is None:
        replica = getattr(parallel, "data_parallel_index", 0)
    return range(replica * size, (replica + 1) * size)


def of_a_start(vllm_config: Any, loader: SharingLoader) -> dict[str, int]:
    """Return the bytes that an engine will allocate on each of its devices: private memory, and weights to publish."""
    devices = devices_of(vllm_config)
    resident = _resident(vllm_config)
    if devices == ("cpu",):
        weights = max(0, weight_bytes(vllm_config, loader) - resident)
        return {"cpu": weights + vllm_config.parallel_config.world_size * kv_bytes_on_cpu(vllm_config)}
    return {device: _on_gpu(vllm_config, rank, resident) for rank, device in enumerate(devices)}


def _resident(vllm_config: Any) -> int:
    """Return the bytes of the engine's models that stay on its device; 0 for several workers, which have parts each."""
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1:
        return 0
    if compat.device_of(vllm_config).type != "cuda":
        return accounting.external_bytes(vllm_config, in_use=True)
    with torch.cuda.device(compat.gpu_of(local_ranks(parallel)[0])):
        return accounting.external_bytes(vllm_config, in_use=True)


def _on_gpu(vllm_config: Any, rank: int, resident: int) -> int:
    cache, total = vllm_config.cache_config, compat.bytes_of_gpu(local_ranks(vllm_config.parallel_config)[rank])
    requested = math.ceil(total * float(cache.gpu_memory_utilization))
    fixed = cache.kv_cache_memory_bytes
    if fixed is None:
        return max(0, requested - resident)
    return min(max(0, requested - resident), int(fixed) + GUESSED_PEAK)


def weight_bytes(vllm_config: Any, loader: SharingLoader) -> int:
    """Return the bytes of a checkpoint's files; 0 if they cannot be found, which loading will explain."""
    try:
        return loader.checkpoint_bytes(vllm_config.model_config)
    except (WoolyError, OSError) as error:
        compat.logger().debug("wooly: the bytes of the checkpoint are unknown before it is loaded: %s", error)
        return 0


def kv_bytes_on_cpu(vllm_config: Any) -> int:
    """Return the bytes of one worker's KV cache on a CPU."""
    cache = vllm_config.cache_config
    blocks, fixed = cache.num_gpu_blocks_override, cache.kv_cache_memory_bytes
    if blocks is None:
        return int(fixed or 0)
    try:
        return int(blocks) * compat.block_bytes(vllm_config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        compat.logger().warning("wooly: the size of the KV cache is not known before it exists: %r", error)
        return 0
