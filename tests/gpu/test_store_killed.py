"""The store is killed under engines that answer on a GPU: their VRAM outlives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.killed import kill_store_under_load
from support.models import large_llama

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a checkpoint of 600 MB in one file: reading it would show among the bytes that an engine reads."""
    path = tmp_path / "model"
    large_llama.run("make", str(path), "--layers", "1", "--vocabulary", "10000")
    parts = sorted(path.glob("*.safetensors"))
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for part in (*parts, path / large_llama.INDEX):
        part.unlink()
    return path


@pytest.mark.usefixtures("vram_returned")
def test_store_killed_under_load_on_a_gpu(engine: Any, model: Path, runtime_dir: Path) -> None:
    """With CUDA graphs; VRAM is freed in the end."""
    pytest.importorskip("vllm")
    settings = {"enforce_eager": False, "gpu_memory_utilization": 0.15, "enable_prefix_caching": False}
    kill_store_under_load(engine, model, runtime_dir, settings=settings)
