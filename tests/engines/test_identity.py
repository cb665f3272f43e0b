"""Identity is the bytes: not names, shapes, sizes, times or paths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.engines import status_of
from support.models.zeroed import zero_one_norm

from shared_store.base.layout import GRANULARITY, round_up

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_one_zeroed_norm_is_another_model_that_shares_all_other_tensors(
    engine: Any, checkpoint: Any, runtime_dir: Path, tmp_path: Path
) -> None:
    """Each checkpoint answers as its stock twin does; the store holds the common tensors once."""
    original, zeroed = checkpoint("llama"), tmp_path / "zeroed"
    zero_one_norm(original, zeroed)
    stock = engine(original, zeroed)
    assert stock.finish() == 0, stock.log[-20:]
    shared = engine(original, zeroed, load_format="wooly", extra={"fallback": False})
    assert shared.finish() == 0, shared.log[-20:]
    for path in (original, zeroed):
        assert shared.wait("answered", str(path))["tokens"] == stock.wait("answered", str(path))["tokens"]
    assert stock.wait("answered", str(original))["tokens"] != stock.wait("answered", str(zeroed))["tokens"]
    status = status_of(runtime_dir)
    norm_bytes = 2 * 256  # bf16, the width of the random model
    assert len({model.key for model in status.models}) == 2
    assert [model.unique_bytes for model in status.models] == [norm_bytes, norm_bytes]
    first, second = (model.bytes for model in status.models)
    assert first == second
    assert status.devices[0].resident_bytes <= round_up(first, GRANULARITY) + GRANULARITY


def test_the_same_bytes_under_two_paths_are_one_model(
    engine: Any, checkpoint: Any, runtime_dir: Path, tmp_path: Path
) -> None:
    """A copy attaches to what the original published."""
    original, copy = checkpoint("llama"), tmp_path / "somewhere-else"
    shutil.copytree(original, copy)
    process = engine(original, copy, load_format="wooly", extra={"fallback": False})
    assert process.finish() == 0, process.log[-20:]
    assert process.wait("answered", str(original))["tokens"] == process.wait("answered", str(copy))["tokens"]
    status = status_of(runtime_dir)
    assert (len(status.models), status.counters.publishes, status.counters.attaches) == (1, 1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing vLLM here, in this process, warns
def test_ranks_that_hold_other_experts_have_other_keys() -> None:
    """Data parallel ranks divide experts, with expert parallelism and without; a dense model is the same on all."""
    from vllm.config import ParallelConfig

    from wooly_vllm.compat import divided_further

    ranks = [ParallelConfig(data_parallel_size=2, data_parallel_rank=rank) for rank in (0, 1)]
    alone = ParallelConfig()
    assert divided_further(ranks[0], experts=True) != divided_further(ranks[1], experts=True)
    assert divided_further(ranks[0], experts=True) != divided_further(alone, experts=True)
    assert divided_further(ranks[0], experts=False) == divided_further(ranks[1], experts=False)
    assert divided_further(ranks[0], experts=False) == divided_further(alone, experts=False)
