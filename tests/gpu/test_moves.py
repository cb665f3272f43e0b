"""A worker leaves its GPU between steps and returns, with CUDA graphs and running requests, on both model runners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import used_mib
from support.adapters import random_adapter
from support.commands import Move, commanded, commands
from support.drafts import eagle_head
from support.engines import SHARING, EngineProcess

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("swappable"), pytest.mark.timeout(590)]

KV_BYTES = 2 << 30
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": KV_BYTES,
    "enable_prefix_caching": True,
    "max_num_seqs": 64,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
}
FAMILIES = ("gemma3", "deepseek-v2", "qwen3-moe", "gpt-oss", "jamba")


def assert_moved(one: dict[str, Any]) -> None:
    assert one["refused"] == ""
    assert one["resident"] >= KV_BYTES
    assert one["resident_away"] == 0
    assert one["left"]["moved"] == one["filled"]["moved"]
    assert (one["left"]["error"], one["created"], one["filled"]["lost"]) == ("", "", "")
    assert one["swap_files"] == 0


@pytest.fixture(scope="module", params=["0", "1"], ids=["V1", "V2"])
def move(
    request: pytest.FixtureRequest,
    module_runtime_dir: Path,
    checkpoint: Any,
    tmp_path_factory: Any,
) -> Iterator[Move]:
    """Return a function that runs a command of `moving.py` in an engine that shares its weights."""
    job = {"models": [str(checkpoint("llama"))], "settings": GRAPHS, "obey": True, **SHARING}
    environment = {
        "VLLM_USE_V2_MODEL_RUNNER": request.param,
        "WOOLY_SWAP_DIR": str(tmp_path_factory.mktemp("swap")),
    }
    with commanded(module_runtime_dir, job, **environment) as run:
        yield run


@pytest.fixture(scope="module")
def undisturbed(move: Move) -> list[list[int]]:
    """Return the tokens of 64 requests of an engine that never moved; they repeat."""
    tokens: list[list[int]] = move("answer", copies=16)["tokens"]
    assert move("answer", copies=16)["tokens"] == tokens
    return tokens


def test_kv_cache_lies_in_ranges(move: Move) -> None:
    facts = move("facts")
    assert facts["refusal"] == ""
    assert facts["device"].startswith("GPU-")
    assert sum(nbytes for _, nbytes in facts["ranges"]) <= facts["private"] <= facts["needs"]
    assert facts["private"] - facts["stays"] >= KV_BYTES


def test_running_requests_end_with_the_same_tokens(move: Move, undisturbed: list[list[int]]) -> None:
    found = move("answer", copies=16, moves=(5, 17, 30))
    assert found["tokens"] == undisturbed
    assert len(found["moves"]) == 3
    for one in found["moves"]:
        assert one["running"] >= 64
        assert_moved(one)


def test_twenty_moves_in_one_batch(move: Move, undisturbed: list[list[int]]) -> None:
    found = move("answer", copies=16, moves=tuple(range(3, 40, 2))[:20])
    assert found["tokens"] == undisturbed


def test_control_without_saved_blocks_differs(move: Move, undisturbed: list[list[int]]) -> None:
    assert move("answer", copies=16, moves=(17,), save=False)["tokens"] != undisturbed


def test_vram_is_free_while_it_is_away(move: Move, gpu: str) -> None:
    before = used_mib(gpu)
    move("leave")
    away = used_mib(gpu)
    move("come_back")
    assert before - away >= KV_BYTES >> 20
    assert used_mib(gpu) <= before + 64


def test_without_host_memory_copies_go_to_the_swap_directory(
    module_runtime_dir: Path, checkpoint: Any, tmp_path: Path
) -> None:
    job = {"models": [str(checkpoint("llama"))], "settings": GRAPHS, "obey": True, **SHARING}
    process = EngineProcess(module_runtime_dir, job, WOOLY_SWAP_DIR=str(tmp_path), WOOLY_HOST_BUDGET="1MiB")
    try:
        run = commands(process)
        right = run("answer", copies=16)["tokens"]
        found = run("answer", copies=16, moves=(17,))
        assert found["tokens"] == right
        assert found["moves"][0]["swap_files"] == 1
        lost = run("answer", copies=16, moves=(17,), corrupt=True)
        assert "[digest_mismatch]" in lost["moves"][0]["filled"]["lost"]
        assert lost["tokens"] == right
    finally:
        process.close()


def test_adapters_return_with_their_contents(module_runtime_dir: Path, checkpoint: Any, tmp_path: Path) -> None:
    base = checkpoint("llama")
    adapters = {name: str(random_adapter(base, tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two"))}
    settings = GRAPHS | {"enable_lora": True, "max_loras": 4, "max_lora_rank": 64}
    job = {"models": [str(base)], "settings": settings, "obey": True, "adapters": adapters, **SHARING}
    process = EngineProcess(module_runtime_dir, job)
    try:
        run = commands(process)
        assert len(run("facts")["ranges"]) >= 2
        right = process.do("answer")["answers"]
        for _ in range(3):
            run("idle", most=0)
            assert process.do("answer")["answers"] == right
    finally:
        process.close()


def test_sleep_mode_discards_the_cache_and_keeps_adapters(
    gpu: str, module_runtime_dir: Path, checkpoint: Any, tmp_path: Path
) -> None:
    """The sleep of vLLM frees the memory of the KV cache, although it is not in its pool."""
    base = checkpoint("llama")
    adapters = {"one": str(random_adapter(base, tmp_path / "one", seed=1))}
    settings = GRAPHS | {"enable_sleep_mode": True, "enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    job = {"models": [str(base)], "settings": settings, "obey": True, "adapters": adapters, **SHARING}
    process = EngineProcess(module_runtime_dir, job)
    try:
        process.wait("answered")
        right = process.do("answer")["answers"]
        for _ in range(3):
            before = used_mib(gpu)
            process.do("sleep 1")
            assert before - used_mib(gpu) >= KV_BYTES >> 20
            process.do("wake")
            assert process.do("answer")["answers"] == right
        assert_moved(commands(process)("idle"))
    finally:
        process.close()


def returns(runtime_dir: Path, model: Path, swap_dir: Path, settings: dict[str, Any]) -> None:
    """Move an engine three times in a batch: its tokens are those of the engine that never moved."""
    job = {"models": [str(model)], "settings": GRAPHS | settings, "obey": True, **SHARING}
    process = EngineProcess(runtime_dir, job, WOOLY_SWAP_DIR=str(swap_dir))
    try:
        run = commands(process)
        assert run("facts")["refusal"] == ""
        right = run("answer", copies=4)["tokens"]
        found = run("answer", copies=4, moves=(5, 11, 17))
        assert found["tokens"] == right
        assert len(found["moves"]) == 3
        assert run("answer", copies=4, moves=(11,), save=False)["tokens"] != right
    finally:
        process.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cache_returns(module_runtime_dir: Path, checkpoint: Any, tmp_path: Path, family: str) -> None:
    returns(module_runtime_dir, checkpoint(family), tmp_path, {})


def test_quantized_cache_returns(module_runtime_dir: Path, checkpoint: Any, tmp_path: Path) -> None:
    returns(module_runtime_dir, checkpoint("llama"), tmp_path, {"kv_cache_dtype": "fp8"})


def test_cache_of_a_draft_model_returns(module_runtime_dir: Path, checkpoint: Any, tmp_path: Path) -> None:
    target = checkpoint("llama")
    head = eagle_head(target, tmp_path / "eagle")
    speculative = {"method": "eagle", "num_speculative_tokens": 2, "model": str(head)}
    returns(module_runtime_dir, target, tmp_path, {"speculative_config": speculative})
