"""Tensor parallel engines: each rank shares with the same rank of another engine, and with nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import BESIDE_OTHERS
from support.ranks import ranks_share

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


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
    devices = ranks_share(
        engine, checkpoint(family), runtime_dir, settings={**BESIDE_OTHERS, "tensor_parallel_size": 2}
    )
    assert len(set(devices)) == 2
