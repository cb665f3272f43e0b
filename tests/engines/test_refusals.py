"""Why engines cannot be swapped out: by their configuration, by their parts, and by their user."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import SHARING, status_of
from support.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def refusals() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn about deprecations in torch
        from wooly_vllm.residency import refusals
    return refusals


def configured(**changes: Any) -> Any:
    """Return the parts of a configuration that matter, of an engine on one CPU."""
    parallel = {"data_parallel_size": 1, "nnodes": 1, "enable_fault_tolerance": False}
    parallel |= {key: changes.pop(key) for key in parallel if key in changes}
    given = {
        "kv_transfer_config": None,
        "ec_transfer_config": None,
        "attention_config": SimpleNamespace(hisparse_config=None),
        "model_config": SimpleNamespace(is_moe=False),
        "device_config": SimpleNamespace(device="cpu"),
        **changes,
    }
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **given)


def test_an_ordinary_engine_has_no_reason(refusals: Any) -> None:
    assert refusals.by_configuration(configured()) == ""
    assert refusals.by_configuration(configured(data_parallel_size=2)) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"ec_transfer_config": object()}, "encoder cache connector"),
        ({"attention_config": SimpleNamespace(hisparse_config=object())}, "HiSparse"),
        ({"data_parallel_size": 2, "model_config": SimpleNamespace(is_moe=True)}, "data parallel ranks"),
        ({"enable_fault_tolerance": True}, "fault tolerance"),
        ({"nnodes": 2}, "other nodes"),
    ],
)
def test_reasons_in_a_configuration(refusals: Any, changes: dict[str, Any], reason: str) -> None:
    assert reason in refusals.by_configuration(configured(**changes))


def test_versions_that_were_not_swapped_on_a_gpu(refusals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu = configured(device_config=SimpleNamespace(device="cuda"))
    monkeypatch.setattr(refusals.compat, "version", lambda: "0.26.0")
    assert refusals.by_configuration(on_a_gpu) == refusals.support.REFUSAL
    monkeypatch.setattr(refusals.support, "GPUS", True)
    assert refusals.by_configuration(on_a_gpu) == ""
    monkeypatch.setattr(refusals.compat, "version", lambda: "0.27.1")
    assert "swapping vLLM 0.27.1 on a GPU was not tested" in refusals.by_configuration(on_a_gpu)


class Stranger:
    """An executor or scheduler of another package."""


WITHOUT_A_NAME = """
import pytest
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.executor.abstract import Executor
from shared_store.base.errors import ConfigError
from wooly_vllm.residency import engine

del EngineCoreProc.has_work
before = dict(vars(EngineCore)), dict(vars(EngineCoreProc)), Executor.__init__
with pytest.raises(ConfigError, match="no EngineCoreProc.has_work where wooly looks for it"):
    engine.install()
assert (dict(vars(EngineCore)), dict(vars(EngineCoreProc)), Executor.__init__) == before
"""


def test_a_vllm_without_a_name_is_left_as_it_is() -> None:
    """In a process of its own: hooks that are there stay."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_NAME], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def swappable(runtime_dir: Path) -> dict[str, str]:
    """Return the refusal of each workload, by name."""
    return {it.name: it.refusal for it in status_of(runtime_dir).workloads}


def test_engines_that_their_user_or_their_weights_keep_resident_say_so(
    engine: Any, checkpoint: Any, runtime_dir: Path
) -> None:
    """In one process: an engine that may not be swapped, one that fell back, and one with the stock load format."""
    kept = engine(checkpoint("llama"), **SHARING, hold=True, environment={"WOOLYAI_SWAP_FROM_VRAM": "0"})
    kept.wait("answered")
    wait_until(lambda: any(swappable(runtime_dir).values()), "the workload to say why it stays")
    (reason,) = swappable(runtime_dir).values()
    assert "user" in reason
    with_reasons = [line for line in kept.log if "cannot be swapped out" in line]
    assert len(with_reasons) <= 1

    stock = engine(checkpoint("qwen2"), load_format="auto", hold=True)
    stock.wait("answered")
    wait_until(lambda: len(swappable(runtime_dir)) == 2, "the stock engine to be listed")
    assert any("not shared (load format auto)" in reason for reason in swappable(runtime_dir).values())

    for process in (kept, stock):
        process.tell("go on")
        process.wait("answered again")
        assert process.finish() == 0
    wait_until(lambda: not swappable(runtime_dir), "the workloads to be gone")
