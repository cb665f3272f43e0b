"""Tensor parallel engines: each rank shares with the same rank of another engine, and with nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engines import status_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
}
SHARING: dict[str, Any] = {"load_format": "wooly", "extra": {"fallback": False}}


@pytest.fixture
def two_gpus(gpu: str) -> None:
    visible_gpus = pytest.importorskip("shared_store.memory.cuda_vmm").visible_gpus()
    assert gpu in visible_gpus
    if len(visible_gpus) < 2:
        pytest.skip("one GPU is visible, and two are needed")
    pytest.importorskip("vllm")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ranks_share_with_the_same_rank_of_another_engine(
    engine: Any, checkpoint: Any, runtime_dir: Path, family: str
) -> None:
    """Two engines of two ranks: two models on two devices with two readers each, and stock vLLM's tokens."""
    settings = {**SETTINGS, "tensor_parallel_size": 2}
    stock = engine(checkpoint(family), settings=settings, gate=True)
    sharing = [
        engine(checkpoint(family), settings=settings, gate=True, hold=True, lease=False, **SHARING) for _ in "12"
    ]
    stock.tell("start")
    right = stock.wait("answered")["tokens"]
    assert stock.finish() == 0
    for process in sharing:
        process.tell("start")
        assert process.wait("answered")["tokens"] == right
    status = status_of(runtime_dir)
    assert [model.readers for model in status.models] == [2, 2]
    assert len({model.device for model in status.models}) == 2
    assert (status.counters.publishes, status.counters.attaches, status.counters.fallbacks) == (2, 4, 0)
    for process in sharing:
        process.tell("go on")
        assert process.wait("answered again")["tokens"] == right
        assert process.finish() == 0
