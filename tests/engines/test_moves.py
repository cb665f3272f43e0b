"""A worker leaves its device between steps and returns, in real engines with running requests, on both model runners.

The engine and the worker are one process; `moving.py` calls the worker's methods as the engine does. Memory that
returns is full of ones where nothing restores or zeroes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, EngineProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

V2 = pytest.mark.skipif(find_spec("triton") is None, reason="model runner V2 needs Triton")
RUNNERS = [pytest.param("0", id="V1"), pytest.param("1", id="V2", marks=V2)]
BLOCK = 32
"""Tokens of a KV block, so that a request has several."""
SETTINGS: dict[str, Any] = {"block_size": BLOCK, "enable_prefix_caching": True, "max_num_seqs": 4}

Move = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def swap_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap")


@pytest.fixture(scope="module", params=RUNNERS)
def move(request: pytest.FixtureRequest, module_runtime_dir: Path, checkpoint: Any, swap_dir: Path) -> Iterator[Move]:
    """Return a function that runs a command of `moving.py` in an engine that shares its weights."""
    job = {"models": [str(checkpoint("llama"))], "settings": SETTINGS, "obey": True, **SHARING}
    environment = {"VLLM_USE_V2_MODEL_RUNNER": request.param, "WOOLY_SWAP_DIR": str(swap_dir)}
    process = EngineProcess(module_runtime_dir, job, **environment)

    def run(what: str, **given: Any) -> dict[str, Any]:
        words = json.dumps(given, separators=(",", ":"))
        found = process.do(f"move {what} {words}")
        assert "error" not in found, found["error"]
        return found

    try:
        yield run
        process.tell("stop")
        assert process.finish() == 0, "\n".join(process.log[-40:])
    finally:
        process.close()


@pytest.fixture(scope="module")
def undisturbed(move: Move) -> list[list[int]]:
    """Return the tokens of an engine that never moved."""
    tokens: list[list[int]] = move("answer")["tokens"]
    return tokens


def test_kv_cache_lies_in_ranges(move: Move) -> None:
    facts = move("facts")
    assert not facts["refusal"]
    assert facts["device"] == "cpu"
    assert facts["blocks"] * facts["block_bytes"] <= facts["private"] == facts["needs"]
    assert facts["stays"] == 0
    assert len(facts["ranges"]) == 1


def test_running_requests_end_with_the_same_tokens(move: Move, undisturbed: list[list[int]]) -> None:
    """Three moves in one batch; away, no page of the cache is left, and every request keeps its blocks."""
    found = move("answer", moves=(5, 17, 30))
    assert found["tokens"] == undisturbed
    for one in found["moves"]:
        assert one["running"] >= 8
        assert one["resident"] > 0
        assert one["resident_away"] == one["left"]["private"] == 0
        assert one["left"]["moved"] == one["filled"]["moved"] > 0
        assert (one["left"]["error"], one["created"], one["filled"]["lost"]) == ("", "", "")
        assert one["weights_away"]["disk"] > one["weights_away"]["resident"] == 0
        assert one["weights_away"]["away"] == 1
        assert one["more_descriptors"] == 0


def test_control_without_saved_blocks_differs(move: Move, undisturbed: list[list[int]]) -> None:
    assert move("answer", moves=(17,), save=False)["tokens"] != undisturbed
