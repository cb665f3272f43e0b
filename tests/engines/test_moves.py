"""A worker leaves its device between steps and returns, in real engines with running requests, on both model runners.

The engine and the worker are one process; `moving.py` calls the worker's methods as the engine does. Memory that
returns is full of ones where nothing restores or zeroes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.adapters import random_adapter
from support.commands import Move, commanded, commands
from support.engines import LEFT_OUT, SHARING, EngineProcess, vllm_since

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

V2 = pytest.mark.skipif(find_spec("triton") is None, reason="model runner V2 needs Triton")
RUNNERS = [pytest.param("0", id="V1"), pytest.param("1", id="V2", marks=V2)]
BLOCK = 32
"""Tokens of a KV block, so that a request has several."""
SETTINGS: dict[str, Any] = {"block_size": BLOCK, "enable_prefix_caching": True, "max_num_seqs": 4}
FAMILIES = [name for name in ("gemma3", "deepseek-v2", "qwen3-moe", "gpt-oss", "mamba2") if name not in LEFT_OUT]
"""A sliding window, MLA, experts, sinks, and states only. Hybrids that vLLM runs on a CPU are not among the models."""
PREFIX = [[*range(100, 100 + 3 * BLOCK), 5]]
"""A prompt of three whole blocks and one token."""


@pytest.fixture(scope="module")
def swap_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap")


@pytest.fixture(scope="module", params=RUNNERS)
def move(request: pytest.FixtureRequest, module_runtime_dir: Path, checkpoint: Any, swap_dir: Path) -> Iterator[Move]:
    """Return a function that runs a command of `moving.py` in an engine that shares its weights."""
    job = {"models": [str(checkpoint("llama"))], "settings": SETTINGS, "obey": True, **SHARING}
    environment = {"VLLM_USE_V2_MODEL_RUNNER": request.param, "WOOLY_SWAP_DIR": str(swap_dir)}
    with commanded(module_runtime_dir, job, **environment) as run:
        yield run


@pytest.fixture(scope="module")
def undisturbed(move: Move) -> list[list[int]]:
    """Return the tokens of an engine that never moved."""
    tokens: list[list[int]] = move("answer")["tokens"]
    return tokens


def assert_moved(one: dict[str, Any]) -> None:
    """Assert that a move went well, and that nothing of the cache was resident meanwhile."""
    assert one["refused"] == ""
    assert one["resident"] > 0
    assert one["resident_away"] == one["left"]["private"] == 0
    assert one["left"]["moved"] == one["filled"]["moved"] > 0
    assert (one["left"]["error"], one["created"], one["filled"]["lost"]) == ("", "", "")
    assert one["swap_files"] == 1
    assert one["more_descriptors"] == 0


def cache_ranges(facts: dict[str, Any]) -> int:
    """Return how many ranges the KV cache has: one since vLLM 0.29, before that one for each layer's tensor."""
    return 1 if vllm_since("0.29") else int(facts["tables"])


def test_kv_cache_lies_in_ranges(move: Move) -> None:
    facts = move("facts")
    assert not facts["refusal"]
    assert facts["device"] == "cpu"
    assert facts["blocks"] * facts["block_bytes"] <= facts["private"] == facts["needs"]
    assert facts["stays"] == 0
    assert len(facts["ranges"]) == cache_ranges(facts)


def test_running_requests_end_with_the_same_tokens(move: Move, undisturbed: list[list[int]]) -> None:
    """Three moves in one batch; away, no page of the cache is left, and every request keeps its blocks."""
    found = move("answer", moves=(5, 17, 30))
    assert found["tokens"] == undisturbed
    assert len(found["moves"]) == 3
    for one in found["moves"]:
        assert one["running"] >= 8
        assert_moved(one)
        assert one["weights_away"]["disk"] > one["weights_away"]["resident"] == 0
        assert one["weights_away"]["away"] == 1


def test_control_without_saved_blocks_differs(move: Move, undisturbed: list[list[int]]) -> None:
    assert move("answer", moves=(17,), save=False)["tokens"] != undisturbed


def test_prefixes_are_found_after_a_move(move: Move) -> None:
    before = move("answer", prompts=PREFIX)
    assert_moved(move("idle"))
    after = move("answer", prompts=PREFIX, fresh=False)
    assert before["cached"] == [0]
    assert after["cached"] == [3 * BLOCK]
    assert after["tokens"] == move("answer", prompts=PREFIX, fresh=False)["tokens"]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_prefixes_that_are_not_saved_are_computed_again(move: Move, most: int) -> None:
    """The newest are saved: of one request, the blocks at its beginning."""
    right = move("answer", prompts=PREFIX)["tokens"]
    moved = move("idle", most=most)
    assert (moved["kept"], moved["running"]) == (most, 0)
    assert moved["dropped"] >= 3 - most
    after = move("answer", prompts=PREFIX, fresh=False)
    assert after["cached"] == [most * BLOCK]
    assert after["tokens"] == right


def test_blocks_of_running_requests_are_saved_whatever_the_limit(move: Move, undisturbed: list[list[int]]) -> None:
    found = move("answer", moves=(17,), most=0)
    assert found["tokens"] == undisturbed
    assert found["moves"][0]["kept"] == found["moves"][0]["running"] > 0


def test_memory_that_cannot_be_had_leaves_it_away_and_a_later_return_succeeds(
    move: Move, undisturbed: list[list[int]]
) -> None:
    found = move("answer", moves=(17,), refused_returns=3)
    assert found["tokens"] == undisturbed
    assert len(found["moves"][0]["refusals"]) == 3
    assert all("[memory]" in reason for reason in found["moves"][0]["refusals"])
    assert_moved(found["moves"][0])


def test_copies_that_cannot_be_written_leave_everything_in_place(move: Move, undisturbed: list[list[int]]) -> None:
    found = move("answer", moves=(5, 17), file_limit=4096)
    assert found["tokens"] == undisturbed
    for one in found["moves"]:
        assert "[disk]" in one["refused"]
        assert one["more_descriptors"] == 0


def test_corrupt_copies_are_found_and_requests_are_computed_again(move: Move, undisturbed: list[list[int]]) -> None:
    found = move("answer", moves=(17,), corrupt=True)
    assert "[digest_mismatch]" in found["moves"][0]["filled"]["lost"]
    assert found["tokens"] == undisturbed


@pytest.fixture(scope="module")
def adapters(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the directories of two adapters of the base, by name."""
    directory = tmp_path_factory.mktemp("adapters")
    base = checkpoint("llama")
    return {name: str(random_adapter(base, directory / name, seed=seed)) for seed, name in enumerate(("one", "two"))}


def test_adapters_return_with_their_contents(
    module_runtime_dir: Path, checkpoint: Any, adapters: dict[str, str], swap_dir: Path
) -> None:
    """Answers of both adapters are the same after three moves; only used slots are copied."""
    lora = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 64}
    job = {"models": [str(checkpoint("llama"))], "settings": SETTINGS | lora, "obey": True, "adapters": adapters}
    process = EngineProcess(module_runtime_dir, {**job, **SHARING}, WOOLY_SWAP_DIR=str(swap_dir))
    try:
        run = commands(process)
        facts = run("facts")
        assert facts["refusal"] == ""
        assert len(facts["ranges"]) == cache_ranges(facts) + 1
        right = process.do("answer")["answers"]
        for _ in range(3):
            moved = run("idle", most=0)
            assert_moved(moved)
            assert moved["left"]["moved"] < max(nbytes for _, nbytes in facts["ranges"])
            assert process.do("answer")["answers"] == right
        process.tell("stop")
        assert process.finish() == 0, "\n".join(process.log[-40:])
    finally:
        process.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cache_returns(module_runtime_dir: Path, checkpoint: Any, swap_dir: Path, family: str) -> None:
    settings = {"max_num_seqs": 4}
    job = {"models": [str(checkpoint(family))], "settings": settings, "obey": True, **SHARING}
    process = EngineProcess(module_runtime_dir, job, WOOLY_SWAP_DIR=str(swap_dir))
    try:
        run = commands(process)
        assert run("facts")["refusal"] == ""
        right = run("answer")["tokens"]
        found = run("answer", moves=(5, 17, 30))
        assert found["tokens"] == right
        for one in found["moves"]:
            assert_moved(one)
        assert run("answer", moves=(17,), save=False)["tokens"] != right
    finally:
        process.close()


@pytest.fixture(scope="module")
def ranks(module_runtime_dir: Path, checkpoint: Any, swap_dir: Path) -> Iterator[Move]:
    """Return a function that runs a command of `moving.py` in an engine of two ranks."""
    settings = SETTINGS | {"tensor_parallel_size": 2}
    job = {"models": [str(checkpoint("llama"))], "settings": settings, "obey": True, "lease": False, **SHARING}
    cpus = sorted(os.sched_getaffinity(0))
    # With fewer NUMA nodes than ranks, vLLM needs the processors of each rank.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}", "WOOLY_SWAP_DIR": str(swap_dir)}
    with commanded(module_runtime_dir, job, **environment) as run:
        yield run


def test_all_ranks_leave_and_return(ranks: Move) -> None:
    right = ranks("ranks")["tokens"]
    found = ranks("ranks", moves=(5, 17))
    assert found["tokens"] == right
    for one in found["moves"]:
        assert (one["saved"], one["created"]) == (["", ""], ["", ""])
        assert [it["private"] for it in one["left"]] == [0, 0]
        assert all(it["lost"] == "" and it["moved"] > 0 for it in one["filled"])


def test_all_ranks_stay_if_one_cannot_save(ranks: Move) -> None:
    right = ranks("ranks")["tokens"]
    found = ranks("ranks", moves=(17,), refuse="save")
    assert found["tokens"] == right
    (one,) = found["moves"]
    assert one["saved"][0] == ""
    assert "[disk]" in one["saved"][1]


def test_all_ranks_are_away_if_one_cannot_return_and_return_later(ranks: Move) -> None:
    right = ranks("ranks")["tokens"]
    found = ranks("ranks", moves=(17,), refuse="create")
    assert found["tokens"] == right
    (one,) = found["moves"]
    assert one["rolled_back"] == [0, 0]
    assert one["created"] == ["", ""]
