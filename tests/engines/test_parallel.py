"""Tensor and data parallel engines on a CPU: each rank shares with its like, and with nobody else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from engines.engine import CPU_KV_BLOCKS
from support.engines import status_of, vllm_since
from support.ranks import ranks_share
from support.servers import CPU_ENVIRONMENT, SMALL_ARGUMENTS, Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {"tensor_parallel_size": 2, "enable_prefix_caching": False}


def test_ranks_share_with_the_same_rank_of_another_engine(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """Two engines of two ranks: two models with two readers each, and stock vLLM's tokens."""
    cpus = sorted(os.sched_getaffinity(0))
    # vLLM wants to be told which processors its ranks use where there are fewer NUMA nodes than ranks.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"}
    ranks_share(engine, checkpoint("llama"), runtime_dir, settings=SETTINGS, environment=environment)


@pytest.mark.skipif(vllm_since("0.33"), reason="from 0.33 on vLLM wants a NUMA node for each replica on a CPU")
def test_replicas_of_a_server_read_one_copy(checkpoint: Any, tmp_path: Path, runtime_dir: Path) -> None:
    """One server with two data parallel ranks: one model, two readers, and the same answer from whichever is asked."""
    arguments = [*SMALL_ARGUMENTS, "--load-format", "wooly", "--data-parallel-size", "2"]
    arguments += ["--num-gpu-blocks-override", str(CPU_KV_BLOCKS)]
    arguments += ["--model-loader-extra-config", '{"fallback": false}']
    # vLLM refuses replicas without binding where there are fewer NUMA nodes than replicas.
    environment = {**CPU_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "auto", "WOOLY_RUNTIME_DIR": str(runtime_dir)}
    path = str(checkpoint("llama"))
    with Server("replicas", path, tmp_path / "log", arguments=arguments, environment=environment) as server:
        server.wait_ready(600)
        answers = {server.complete([5, 9, 100, 7], max_tokens=8).token_ids for _ in range(4)}
        status = status_of(runtime_dir)
        log = server.log.read_text(errors="replace")
    assert len(answers) == 1
    assert [model.readers for model in status.models] == [2]
    assert (status.counters.publishes, status.counters.attaches, status.counters.fallbacks) == (1, 2, 0)
    assert "EngineCore_DP0" in log
    assert "EngineCore_DP1" in log
