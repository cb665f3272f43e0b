"""Sleep level 1 with shared weights on a GPU, with CUDA graphs: VRAM is free while asleep, tokens are right after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import used_mib
from support.adapters import random_adapter
from support.engines import SHARING, status_of
from support.models import large_llama
from support.waiting import wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

KV_BYTES = 256 << 20
SLEEPY: dict[str, Any] = {
    "enforce_eager": False,
    "enable_sleep_mode": True,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": KV_BYTES,
    "enable_prefix_caching": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]},
}
TOLERATED_MIB = 64
"""MiB that may be in use more or less than before: caches of torch and of the driver."""


def resident(runtime_dir: Path, gpu: str) -> int:
    return next(device.resident_bytes for device in status_of(runtime_dir).devices if device.id == gpu)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of more than a GiB, so that it shows in VRAM."""
    directory = tmp_path_factory.mktemp("large") / "model"
    large_llama.run("make", str(directory), "--layers", "4")
    return directory


def awake(engine: Any, model: Path) -> tuple[Any, Any]:
    """Return an engine with shared weights and sleep mode, and its answers."""
    process = engine(model, settings=SLEEPY, obey=True, **SHARING)
    process.wait("answered")
    return process, process.do("answer")["answers"]


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.usefixtures("vram_returned")
def test_twenty_cycles(engine: Any, checkpoint: Any, tmp_path: Path, runtime_dir: Path, gpu: str, lora: bool) -> None:
    """CUDA graphs captured before sleeping replay on the restored weights: stock's tokens in every cycle."""
    pytest.importorskip("vllm")
    model = checkpoint("llama")
    adapters = {"one": str(random_adapter(model, tmp_path / "one", seed=1))} if lora else {}
    settings = SLEEPY | ({"enable_lora": True, "max_loras": 1, "max_lora_rank": 8} if lora else {})
    stock = engine(model, settings=settings, adapters=adapters, obey=True)
    stock.wait("answered")
    right = stock.do("answer")["answers"]
    stock.tell("stop")
    assert stock.finish() == 0
    for _ in ("publisher", "reader"):
        process = engine(model, settings=settings, adapters=adapters, obey=True, **SHARING)
        process.wait("answered")
        found = process.do("cycles 20")
        assert (found.get("error"), found["wrong"], found["moved"]) == (None, 0, 0)
        assert found["answers"] == right
        process.tell("stop")
        assert process.finish() == 0
    counters = status_of(runtime_dir).counters
    assert (counters.fallbacks, counters.evictions, counters.publishes) == (0, 0, 1)
    assert (counters.sleeps, counters.wakes, counters.returns) == (40, 40, 40)
    assert resident(runtime_dir, gpu) > 0  # resident without readers


@pytest.mark.usefixtures("vram_returned")
def test_two_engines(engine: Any, large: Path, runtime_dir: Path, gpu: str) -> None:
    """One sleeps while the other answers; VRAM is free when both sleep; they wake in either order, and share."""
    pytest.importorskip("vllm")
    one = engine(large, settings=SLEEPY, obey=True, **SHARING)
    one.wait("answered")
    other = engine(large, settings=SLEEPY, obey=True, **SHARING)
    other.wait("answered")
    right = one.do("answer")["answers"]
    assert other.do("answer")["answers"] == right
    weights, awake = resident(runtime_dir, gpu), used_mib(gpu)
    assert weights > 1 << 30

    assert one.do("sleep 1").get("error") is None
    assert resident(runtime_dir, gpu) == weights
    assert used_mib(gpu) <= awake - KV_BYTES / 2**20 + TOLERATED_MIB
    assert other.do("answer")["answers"] == right

    assert other.do("sleep 1").get("error") is None
    assert resident(runtime_dir, gpu) == 0
    (model,) = status_of(runtime_dir).models
    assert (model.readers, model.away, model.resident_bytes, model.host_bytes) == (0, 2, 0, model.bytes)
    freed = (weights + 2 * KV_BYTES) / 2**20
    wait_until(lambda: used_mib(gpu) <= awake - freed + TOLERATED_MIB, "VRAM of weights and KV caches to be free")

    for first, second in ((one, other), (other, one)):
        assert first.do("wake").get("error") is None
        assert first.do("answer")["answers"] == right
        assert second.do("wake").get("error") is None
        assert resident(runtime_dir, gpu) == weights
        assert used_mib(gpu) <= awake + TOLERATED_MIB
        assert second.do("answer")["answers"] == right
        for process in (one, other):
            assert process.do("sleep 1").get("error") is None
        assert resident(runtime_dir, gpu) == 0
    for process in (one, other):
        assert process.do("wake weights").get("error") is None
        assert process.do("wake kv_cache").get("error") is None
        assert process.do("answer")["answers"] == right
        process.tell("stop")
        assert process.finish() == 0
    counters = status_of(runtime_dir).counters
    assert (counters.fallbacks, counters.evictions) == (0, 0)


@pytest.mark.usefixtures("vram_returned")
def test_the_kv_cache_alone_does_not_bring_the_weights(
    engine: Any, checkpoint: Any, runtime_dir: Path, gpu: str
) -> None:
    """Tags have the same effect as in stock vLLM."""
    pytest.importorskip("vllm")
    process, right = awake(engine, checkpoint("llama"))
    process.do("sleep 1")
    assert process.do("wake kv_cache").get("error") is None
    assert resident(runtime_dir, gpu) == 0
    assert process.do("wake weights").get("error") is None
    assert resident(runtime_dir, gpu) > 0
    assert process.do("answer")["answers"] == right
    process.tell("stop")
    assert process.finish() == 0


@pytest.mark.usefixtures("vram_returned")
def test_writing_operations_are_refused_and_the_engine_goes_on(
    engine: Any, checkpoint: Any, runtime_dir: Path, gpu: str
) -> None:
    """Level 2 and reloading raise and change nothing; the engine answers without waking first."""
    pytest.importorskip("vllm")
    process, right = awake(engine, checkpoint("llama"))
    before = resident(runtime_dir, gpu)
    assert "sleep level 2" in process.do("sleep 2")["error"]
    assert process.do("answer")["answers"] == right
    for method in ("sleep 2", "reload_weights", "update_weights {}"):
        assert "these weights are shared" in process.do(f"rpc {method}")["error"]
    assert process.do("answer")["answers"] == right
    assert resident(runtime_dir, gpu) == before
    assert process.do("cycles 1")["wrong"] == 0
    process.tell("stop")
    assert process.finish() == 0


@pytest.mark.usefixtures("vram_returned")
def test_sleeping_without_a_store_is_refused(engine: Any, checkpoint: Any, runtime_dir: Path) -> None:
    """Without a store there is no host copy; the engine goes on."""
    from support.engines import stop_store

    pytest.importorskip("vllm")
    process, right = awake(engine, checkpoint("llama"))
    stop_store(runtime_dir)
    assert "this engine cannot sleep, and stays awake" in process.do("sleep 1")["error"]
    assert process.do("answer")["answers"] == right
    process.tell("stop")
    assert process.finish() == 0


@pytest.mark.usefixtures("vram_returned")
def test_private_memory_in_the_pool_of_sleep_mode(engine: Any, large: Path, runtime_dir: Path, gpu: str) -> None:
    """A publisher frees its original tensors: its private memory is that of a reader."""
    pytest.importorskip("vllm")
    own = []
    for _ in ("publisher", "reader"):
        process = engine(large, settings=SLEEPY, obey=True, **SHARING)
        process.wait("answered")
        found = process.do("pools")
        assert found.get("weights", 0) < 64 << 20
        assert found["kv_cache"] >= KV_BYTES
        own.append(found["torch"])
        process.tell("stop")
        assert process.finish() == 0
    assert resident(runtime_dir, gpu) > 1 << 30
    assert own[0] <= own[1] + (256 << 20), own


_POOL = """
import torch
from vllm.device_allocator.cumem import CuMemAllocator
from wooly_vllm import compat
GIB = 1 << 30
torch.zeros(1, device="cuda")
with compat.outside_sleep_pool() as there:
    assert not there
allocator = CuMemAllocator.get_instance()
free = lambda: torch.cuda.mem_get_info()[0]
with allocator.use_memory_pool("weights"):
    inside = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    assert allocator.get_current_usage() == GIB
    before = free()
    with compat.outside_sleep_pool() as there:
        assert there
        original = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
        small = torch.full((1000,), 7, dtype=torch.uint8, device="cuda")
        assert allocator.get_current_usage() == GIB
        assert free() <= before - 2 * GIB
        del original
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert free() >= before - (64 << 20), (before, free())
    again = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    assert allocator.get_current_usage() == 2 * GIB
    try:
        with compat.outside_sleep_pool():
            raise KeyError
    except KeyError:
        pass
    third = torch.full((GIB,), 5, dtype=torch.uint8, device="cuda")
    assert allocator.get_current_usage() == 3 * GIB
with compat.outside_sleep_pool() as there:
    assert not there
allocator.sleep(offload_tags=("weights",))
assert int(small.sum()) == 7000  # neither set aside nor thrown away
allocator.wake_up()
assert int(third[-1]) == 5
print("right")
"""


@pytest.mark.usefixtures("gpu")
def test_memory_outside_of_the_pool() -> None:
    """It is freed while the pool is in use, and not offloaded with it; later allocations use the pool again."""
    pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, "-c", _POOL], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("right\n"), done.stderr[-3000:]
