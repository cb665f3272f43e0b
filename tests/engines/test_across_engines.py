"""One checkpoint in a transformers process and in a vLLM engine: what is the same in the end is in memory once."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.jobs import PRELOADED, Job
from support.engines import status_of

from shared_store.base.layout import GRANULARITY

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

_SAME_IN_BOTH = ("embed_tokens.weight", "norm.weight", "down_proj.weight")
"""Tensors of a checkpoint that both engines keep as they are; vLLM merges q, k and v, and gate and up."""
_SMALL_ENOUGH_TO_PACK = "o_proj.weight"
"""vLLM on a machine with AMX packs it (it is below 1 MiB here), and keeps it as it is on others."""
_SMALLEST_WEIGHT = 2 * 576
"""Bytes of a norm of SmolLM2, in bf16."""

_LOAD = """
import torch, transformers, wooly_hf
model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="wooly:cpu", dtype=torch.bfloat16)
found = wooly_hf.stats(model)
result = [found.shared_bytes, found.private_bytes]
"""


def _bytes_of(checkpoint: Path, *ends: str) -> int:
    """Bytes of the tensors whose names end like that, from the headers of a checkpoint's files."""
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            # A safetensors file: length of the header (u64, little-endian), the header (JSON), the tensors' bytes.
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        places = [entry["data_offsets"] for name, entry in header.items() if name.endswith(ends)]
        total += sum(end - start for start, end in places)
    return total


@pytest.fixture(scope="module", autouse=True)
def preloaded_transformers() -> None:
    PRELOADED.begin()


def test_they_share_every_tensor_that_is_the_same_and_wooly_models_says_how_much(
    engine: Any, checkpoint: Any, runtime_dir: Path, tmp_path: Path
) -> None:
    """SIZE less UNIQUE of both models is what the checkpoint's headers say must be equal; so much less is in memory."""
    path = checkpoint("smollm2")
    job = Job(runtime_dir, tmp_path / "log", WOOLY_AUTOSTART="1")
    try:
        job.begin(_LOAD, path=str(path))
        mapped, private = job.finish()
        assert private < mapped / 100
        serving = engine(path, load_format="wooly", extra={"fallback": False}, hold=True)
        serving.wait("answered")
        listed = subprocess.run(
            [sys.executable, "-m", "shared_store.cli", "models", "--json", "--runtime-dir", str(runtime_dir)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        models = json.loads(listed.stdout)
        of = {model["engine"].split()[0]: model for model in models}
        assert set(of) == {"transformers", "vllm"}
        assert [model["readers"] for model in models] == [1, 1]
        shared = {engine: model["bytes"] - model["unique_bytes"] for engine, model in of.items()}
        same = _SAME_IN_BOTH if torch.cpu._is_amx_tile_supported() else (*_SAME_IN_BOTH, _SMALL_ENOUGH_TO_PACK)
        assert shared["transformers"] == _bytes_of(path, *same)
        # vLLM's attention scales are all alike: a model's repetitions of a blob of its own are not unique either.
        assert 0 <= shared["vllm"] - shared["transformers"] < _SMALLEST_WEIGHT
        device = status_of(runtime_dir).devices[0]
        once = sum(model["bytes"] for model in models) - shared["transformers"]
        assert device.resident_bytes < once + device.segments * GRANULARITY
    finally:
        job.kill()
