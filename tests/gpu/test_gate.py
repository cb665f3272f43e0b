"""An engine on a GPU is swapped at step boundaries, with CUDA graphs, and takes memory to start and to wake up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, EngineProcess, status_of
from support.plain_workload import MIB, PlainWorkload
from support.stores import KeptStore
from support.waiting import wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("swappable"), pytest.mark.timeout(590)]

KV_BYTES = 1 << 30
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": KV_BYTES,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]},
}
BUDGET = 12 << 30
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def store(gpu: str, module_runtime_dir: Path, tmp_path_factory: Any) -> Iterator[Path]:
    """A store that lets all workloads together use 12 GiB of the GPU."""
    process = KeptStore(
        module_runtime_dir,
        budget={gpu: BUDGET},
        vram_reserve=0,
        min_resident_s=0.1,
        swap_dir=str(tmp_path_factory.mktemp("swap")),
    )
    process.start()
    yield module_runtime_dir
    process.clean_up()


def started(store: Path, model: Path, settings: dict[str, Any], **environment: str) -> tuple[EngineProcess, Run]:
    """Return an engine, and a function that runs a command of `support/gating.py` in it."""
    process = EngineProcess(
        store, {"models": [str(model)], "settings": settings, "obey": True, **SHARING}, **environment
    )

    def run(command: str, **given: Any) -> dict[str, Any]:
        found = process.do(f"gate {command} {json.dumps(given, separators=(',', ':'))}")
        assert "error" not in found, found
        return found

    return process, run


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])
def test_requests_that_run_are_swapped_and_end_with_the_same_tokens(
    store: Path, checkpoint: Any, gpu: str, runner: str
) -> None:
    process, run = started(store, checkpoint("llama"), GRAPHS, VLLM_USE_V2_MODEL_RUNNER=runner)
    try:
        undisturbed = run("answer")["tokens"]
        assert run("answer")["tokens"] == undisturbed
        assert run("answer", swaps=[3, 11, 30])["tokens"] == undisturbed
        assert run("answer", swaps=[11], restore=False)["tokens"] != undisturbed
        assert run("leave")["said"] == ["swapped"]
        away = run("facts")
        assert away["private"][gpu] == away["stays"][gpu] <= away["needs"][gpu] - KV_BYTES
        assert run("answer")["tokens"] == undisturbed
        process.tell("stop")
        assert process.finish() == 0, "\n".join(process.log[-40:])
    finally:
        process.close()


def test_an_engine_starts_by_taking_memory_of_an_idle_one(store: Path, checkpoint: Any) -> None:
    """Each asks for a tenth of the GPU; the budget is less than two tenths of 80 GB."""
    first, run_first = started(store, checkpoint("llama"), GRAPHS, WOOLY_WORKLOAD="first")
    second, run_second = None, None
    try:
        undisturbed = run_first("answer")["tokens"]
        second, run_second = started(store, checkpoint("qwen2"), GRAPHS, WOOLY_WORKLOAD="second")
        other = run_second("answer")["tokens"]
        assert run_first("answer")["tokens"] == undisturbed
        assert run_second("answer")["tokens"] == other
        assert status_of(store).counters.fallbacks == 0
    finally:
        for process in (first, second):
            if process is not None:
                process.close()


def test_wake_up_needs_memory_or_fails_with_the_engine_asleep(store: Path, checkpoint: Any, gpu: str) -> None:
    settings = GRAPHS | {"enable_sleep_mode": True}
    process, run = started(store, checkpoint("llama"), settings, WOOLY_WORKLOAD="sleeper", WOOLY_START_TIMEOUT="3s")
    try:
        undisturbed = run("answer")["tokens"]
        assert "error" not in process.do("sleep 1")
        wait_until(lambda: state(store) == "swapped", "the store to know that the engine sleeps")
        with PlainWorkload(store, "owner", device=gpu, needs=BUDGET // MIB - 3072, swap=False) as owner:
            owner.join("swapped", 0)
            owner.enter()
            error = process.do("wake")["error"]
            assert "TimedOutError" in error
            assert "owner" in error
            assert run("facts")["sleeping"]
        assert "error" not in process.do("wake")
        assert state(store) == "resident"
        assert run("answer")["tokens"] == undisturbed
        process.tell("stop")
        assert process.finish() == 0, "\n".join(process.log[-40:])
    finally:
        process.close()


def state(store: Path) -> str:
    return next(it.state for it in status_of(store).workloads if it.name == "sleeper")
