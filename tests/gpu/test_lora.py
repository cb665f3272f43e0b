"""LoRA over a shared base on a GPU, with CUDA graphs: stock's tokens for the base and each adapter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from support.adapters import random_adapter
from support.engines import SHARING, EngineProcess, status_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

NAMES = ("one", "two")
GRAPHS: dict[str, Any] = {"enforce_eager": False, "gpu_memory_utilization": 0.15}
LORA: dict[str, Any] = {**GRAPHS, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
MORE_ROOM: dict[str, Any] = {**LORA, "max_loras": 3, "max_lora_rank": 16}


@pytest.fixture(scope="module")
def runs(
    gpu: str, gpu_of_torch: str, module_runtime_dir: Path, checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return the answers of stock vLLM, of a publisher, and of a reader with a larger limit of adapters."""
    assert gpu_of_torch == gpu
    pytest.importorskip("vllm")
    base = checkpoint("llama")
    directory = tmp_path_factory.mktemp("adapters")
    adapters = {name: str(random_adapter(base, directory / name, seed=seed)) for seed, name in enumerate(NAMES)}
    jobs = {"stock": {"settings": LORA}, "publisher": {"settings": LORA} | SHARING}
    jobs["reader"] = {"settings": MORE_ROOM} | SHARING
    answers: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for role, job in jobs.items():  # all import vLLM at once, which takes long, and load one after the other
            full = {"models": [str(base)], "adapters": adapters, "gate": True, **job}
            processes[role] = EngineProcess(module_runtime_dir, full)
            stack.callback(processes[role].close)
        for role, process in processes.items():
            process.wait("imported")
            process.tell("start")
            assert process.finish() == 0, "\n".join(process.log[-60:])
            answers[role] = process.wait("answered")
    return answers


@pytest.mark.parametrize("role", ["publisher", "reader"])
@pytest.mark.parametrize("what", ["base", *NAMES, "base again"])
def test_answers_equal_stock(runs: Any, what: str, role: str) -> None:
    """Adapters are loaded and unloaded while the engine runs; a write to the base would have ended it."""
    assert runs[role]["removed"]
    assert runs[role]["with_adapters"][what] == runs["stock"]["with_adapters"][what]


def test_each_adapter_changes_the_answer(runs: Any) -> None:
    """Control: the base and each adapter answer differently."""
    stock = runs["stock"]["with_adapters"]
    for answers in zip(*(stock[name] for name in ("base", *NAMES)), strict=True):
        assert len({tuple(answer) for answer in answers}) == 3


def test_the_base_is_published_once_and_nearly_all_of_it_is_mapped(runs: Any, module_runtime_dir: Path) -> None:
    counters = status_of(module_runtime_dir).counters
    assert (counters.publishes, counters.attaches, counters.fallbacks) == (1, 2, 0)
    for role in ("publisher", "reader"):
        assert runs[role]["private_bytes"] < runs[role]["mapped_bytes"] / 100
