"""The memory that a GPU engine may use beside shared weights, with vLLM's own function and configuration.

vLLM 0.26 does not account for weights outside of its allocator; later versions take their size as an argument of
``request_memory``. There, wooly's rule for 0.26 is compared with vLLM's own.
"""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from wooly_vllm.memory import accounting

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

TOTAL = 80_000_000_000
WEIGHTS = 9_000_000_000
"""Bytes of shared weights that are resident before an engine starts."""


@pytest.fixture(scope="module")
def vllm() -> Any:
    """Return ``request_memory`` and ``CacheConfig`` of the installed vLLM, whose own imports warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.config import CacheConfig
        from vllm.v1.worker.utils import request_memory
    return SimpleNamespace(CacheConfig=CacheConfig, request_memory=request_memory)


@pytest.fixture
def rule(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return wooly's ``request_memory`` for versions that ignore shared weights, for an engine that attaches."""
    monkeypatch.setattr(accounting, "_current", [SimpleNamespace(vllm_config=None)])
    monkeypatch.setattr(accounting, "external_bytes", lambda _: WEIGHTS)
    return accounting._charged_for_shared(vllm.request_memory)


def _snapshot(free: int) -> Any:
    return SimpleNamespace(total_memory=TOTAL, free_memory=free, device_="cuda:0")


def test_shared_weights_are_part_of_the_share(vllm: Any, rule: Any) -> None:
    """Half of the GPU, less the shared weights; equal to the installed vLLM's where it accounts for them."""
    config = vllm.CacheConfig(gpu_memory_utilization=0.5)
    assert rule(_snapshot(TOTAL - WEIGHTS), config) == TOTAL // 2 - WEIGHTS
    if "external_weight_memory" in inspect.signature(vllm.request_memory).parameters:
        assert vllm.request_memory(_snapshot(TOTAL - WEIGHTS), config, WEIGHTS) == TOTAL // 2 - WEIGHTS


def test_a_share_below_the_weights_is_refused_when_the_kv_cache_must_fit_it(vllm: Any, rule: Any) -> None:
    """No memory would be left for the KV cache."""
    with pytest.raises(ValueError, match=f"{WEIGHTS} are shared weights"):
        rule(_snapshot(TOTAL - WEIGHTS), vllm.CacheConfig(gpu_memory_utilization=0.05))


def test_a_share_below_the_weights_is_accepted_when_the_kv_cache_has_a_fixed_size(vllm: Any, rule: Any) -> None:
    """Stock vLLM starts such an engine (its share is free, and the KV cache has a fixed size), so wooly must."""
    config = vllm.CacheConfig(gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 30)
    free = TOTAL - WEIGHTS
    assert vllm.request_memory(_snapshot(free), config) == TOTAL // 20  # an engine that shares nothing
    assert rule(_snapshot(free), config) > 0
    charged = accounting.charge(WEIGHTS, TOTAL, config)
    if "external_weight_memory" in inspect.signature(vllm.request_memory).parameters:
        assert vllm.request_memory(_snapshot(free), config, charged) == rule(_snapshot(free), config)


@pytest.mark.parametrize("free", [0, 1_000_000, 30_999_999_999, 31_000_000_000, TOTAL])
@pytest.mark.parametrize("kv_cache", [None, 1 << 30])
@pytest.mark.parametrize("utilization", [0.05, 0.1125, 0.12, 0.5])
def test_it_is_never_stricter_than_stock(
    vllm: Any, rule: Any, free: int, kv_cache: int | None, utilization: float
) -> None:
    """An engine starts if stock would start with private weights, unless no byte is left for its KV cache."""
    config = vllm.CacheConfig(gpu_memory_utilization=utilization, kv_cache_memory_bytes=kv_cache)
    try:
        vllm.request_memory(_snapshot(free), config)
    except ValueError:
        return  # stock refuses
    if kv_cache is None and utilization * TOTAL <= WEIGHTS:
        return  # stock would start, and have no memory for its KV cache once the weights are loaded
    assert rule(_snapshot(free), config) > 0


def test_an_engine_that_attaches_to_nothing_is_left_to_vllm(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without shared weights, vLLM's own result is returned."""
    monkeypatch.setattr(accounting, "_current", [])
    config = vllm.CacheConfig(gpu_memory_utilization=0.5)
    rule = accounting._charged_for_shared(vllm.request_memory)
    assert rule(_snapshot(TOTAL), config) == vllm.request_memory(_snapshot(TOTAL), config)


def _spoken_for(rank: int, local_rank: int, visible: int, **parallel: Any) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.config import ParallelConfig
    config = ParallelConfig(tensor_parallel_size=parallel.pop("tensor_parallel_size", 1))
    for name, value in parallel.items():  # as vLLM's engine processes set them: the constructor needs GPUs for some
        setattr(config, name, value)
    worker = SimpleNamespace(rank=rank, local_rank=local_rank, vllm_config=SimpleNamespace(parallel_config=config))
    return list(accounting.spoken_for(worker, visible))


def test_the_first_rank_takes_a_turn_on_the_gpus_of_all() -> None:
    """The other ranks wait for it at their first collective."""
    assert _spoken_for(0, 0, 8) == [0]
    assert [_spoken_for(rank, rank, 8, tensor_parallel_size=2) for rank in range(2)] == [[0, 1], []]


def test_data_parallel_ranks_that_wait_for_each_other_take_one_turn() -> None:
    """With a turn each, ranks of two servers could wait in a circle."""
    ranks = [
        _spoken_for(
            0,
            2 * rank,
            8,
            tensor_parallel_size=2,
            data_parallel_size=2,
            data_parallel_size_local=2,
            data_parallel_rank=rank,
        )
        for rank in range(2)
    ]
    assert ranks == [[0, 1, 2, 3], []]


def test_data_parallel_ranks_that_are_independent_take_a_turn_on_their_own_gpu() -> None:
    """Their data parallel size is 1 in vLLM's configuration, and the index is stored separately."""
    assert [_spoken_for(0, rank, 8, data_parallel_index=rank) for rank in range(2)] == [[0], [1]]


def test_gpus_that_are_not_visible_have_no_turn() -> None:
    """GPUs of other nodes, and those hidden from this process, are left out."""
    assert _spoken_for(0, 0, 2, tensor_parallel_size=2, data_parallel_size=2, data_parallel_size_local=2) == [0, 1]
