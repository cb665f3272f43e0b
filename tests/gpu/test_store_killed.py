"""The store is killed under engines that answer on a GPU: their VRAM outlives it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.killed import kill_store_under_load

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a checkpoint of 600 MB in one file: reading it would show among the bytes that an engine reads."""
    gpu_model = pytest.importorskip("gpu_model")
    path = tmp_path / "model"
    make = [sys.executable, gpu_model.__file__, "make", str(path), "--layers", "1", "--vocabulary", "10000"]
    subprocess.run(make, check=True, timeout=120)  # in a separate process, which frees its CUDA context when it ends
    parts = sorted(path.glob("*.safetensors"))
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for part in (*parts, path / gpu_model.INDEX):
        part.unlink()
    return path


@pytest.mark.usefixtures("vram_returned")
def test_store_killed_under_load_on_a_gpu(engine: Any, model: Path, runtime_dir: Path) -> None:
    """With CUDA graphs; VRAM is freed in the end."""
    pytest.importorskip("vllm")
    settings = {"enforce_eager": False, "gpu_memory_utilization": 0.15, "enable_prefix_caching": False}
    kill_store_under_load(engine, model, runtime_dir, settings=settings)
