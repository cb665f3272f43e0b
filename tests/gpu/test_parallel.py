"""Tensor and data parallel engines on two GPUs: each rank shares with its like, and with nobody else.

Replicas on one GPU are independent engines, as vLLM asks for; ``test_engines.py`` has those.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import BESIDE_OTHERS
from support.engines import SHARING, status_of
from support.ranks import ranks_share
from support.servers import CPU_ENVIRONMENT, SMALL_ARGUMENTS, Server

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


@pytest.fixture
def two_gpus(gpu: str) -> None:
    visible_gpus = pytest.importorskip("shared_store.memory.cuda.driver").visible_gpus()
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


REPLICATED = [*SMALL_ARGUMENTS, "--data-parallel-size", "2", "--gpu-memory-utilization", "0.1"]
REPLICATED += ["--kv-cache-memory-bytes", str(256 << 20), "--no-enable-prefix-caching"]
SHARED = ["--load-format", "wooly", "--model-loader-extra-config", json.dumps(SHARING["extra"])]
PROMPT = [5, 9, 100, 7, 3, 44]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_data_parallel_ranks_share_with_the_same_rank_of_another_server(
    checkpoint: Any, tmp_path: Path, runtime_dir: Path, family: str
) -> None:
    """Two servers of two ranks, a GPU for each rank: two models with two readers each, and stock vLLM's tokens."""
    path = str(checkpoint(family))
    environment = {**CPU_ENVIRONMENT, "WOOLY_RUNTIME_DIR": str(runtime_dir)}
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(
                Server(name, path, tmp_path / name, arguments=[*REPLICATED, *more], environment=environment)
            )
            for name, more in {"stock": [], "one": SHARED, "other": SHARED}.items()
        }
        answers = {}
        for name, server in started.items():
            server.wait_ready(500)
            answers[name] = {server.complete(PROMPT, max_tokens=16).token_ids for _ in range(4)}
        status = status_of(runtime_dir)
    assert len(answers["stock"]) == 1  # whichever rank was asked
    assert answers["one"] == answers["other"] == answers["stock"]
    assert [model.readers for model in status.models] == [2, 2]
    assert len({model.device for model in status.models}) == 2
    assert (status.counters.publishes, status.counters.attaches, status.counters.fallbacks) == (2, 4, 0)
