"""Tensor parallel and data parallel engines: each rank shares with its like, and with nobody else."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from support.engines import EngineProcess, status_of

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


def replicas(runtime_dir: Path, model: Path, local_ranks: tuple[int, int]) -> list[EngineProcess]:
    """Two data parallel replicas, as vLLM's offline launcher starts them; the GPU of each by its local rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"models": [str(model)], "settings": SETTINGS, "hold": True, "lease": False, **SHARING}
    return [
        EngineProcess(
            runtime_dir,
            job,
            VLLM_DP_RANK=str(rank),
            VLLM_DP_RANK_LOCAL=str(local_rank),
            VLLM_DP_SIZE="2",
            VLLM_DP_MASTER_IP="127.0.0.1",
            VLLM_DP_MASTER_PORT=str(port),
        )
        for rank, local_rank in enumerate(local_ranks)
    ]


@pytest.mark.parametrize("gpus", [1, 2])
def test_data_parallel_replicas_share_on_a_gpu(
    request: Any, engine: Any, checkpoint: Any, runtime_dir: Path, gpus: int
) -> None:
    """On one GPU the replicas read one copy; on two GPUs each reads its own, and the one of other engines there."""
    if gpus == 2:
        request.getfixturevalue("two_gpus")
    pytest.importorskip("vllm")
    model = checkpoint("llama")
    alone = engine(model, settings=SETTINGS, lease=False, **SHARING)
    right = alone.wait("answered")["tokens"]
    assert alone.finish() == 0
    both = replicas(runtime_dir, model, (0, gpus - 1))
    try:
        assert [replica.wait("answered")["tokens"] for replica in both] == [right, right]
        status = status_of(runtime_dir)
        assert sorted(found.readers for found in status.models) == ([2] if gpus == 1 else [1, 1])
        assert status.counters.fallbacks == 0
        for replica in both:
            replica.tell("go on")
        for replica in both:
            assert replica.wait("answered again")["tokens"] == right
            assert replica.finish() == 0
    finally:
        for replica in both:
            replica.close()
