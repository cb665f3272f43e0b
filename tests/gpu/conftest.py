"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from support.engine_fixtures import checkpoint, engine, module_runtime_dir, runtime_dir
from support.waiting import wait_until

__all__ = [
    "checkpoint",
    "engine",
    "gpu",
    "gpu_of_torch",
    "module_runtime_dir",
    "runtime_dir",
    "swappable",
    "vram_returned",
]

BESIDE_OTHERS: dict[str, Any] = {
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
}
"""Settings of engines that use little of a GPU."""


@pytest.fixture(scope="session")
def gpu() -> str:
    """Return the UUID of the GPU that the test runs on."""
    visible_gpus = pytest.importorskip("shared_store.memory.cuda.driver").visible_gpus()
    if not visible_gpus:
        pytest.skip("no NVIDIA GPU is visible")
    return next(iter(visible_gpus))


@pytest.fixture(scope="session")
def gpu_of_torch() -> str:
    """Return the store's name of torch's first GPU. Another process finds it, for torch makes a context."""
    pytest.importorskip("torch")
    names = "from shared_store.torch.devices import store_device; import torch"
    program = f"{names}; print(store_device(torch.device('cuda', 0)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return found.stdout.strip()


@pytest.fixture(scope="session")
def swappable(gpu: str, gpu_of_torch: str) -> None:
    """Skip where engines on a GPU are not swapped: an untested version of vLLM."""
    assert gpu_of_torch == gpu
    pytest.importorskip("vllm")
    compat = pytest.importorskip("wooly_vllm.compat")
    if not compat.swaps_on_gpus():
        pytest.skip(f"engines of vLLM {compat.version()} are not swapped on a GPU")


def used_mib(device: str) -> int:
    """Return the VRAM in use in MiB, as the driver counts it."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", device]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)


@pytest.fixture
def vram_returned(gpu: str) -> Iterator[None]:
    """Fail the test unless VRAM in use returns, within a minute and 16 MiB, to its value before the test.

    Request it first, so that it is checked after all other fixtures of the test are torn down.
    """
    before = used_mib(gpu)
    yield
    wait_until(lambda: used_mib(gpu) <= before + 16, "VRAM in use to return to its value before the test", timeout_s=60)
