"""LoRA adapters: PEFT directories with random weights for every linear layer of a checkpoint."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8


def random_adapter(base: Path, directory: Path, *, seed: int) -> Path:
    """Write an adapter that changes the answers of ``base``; return its directory.

    Both factors are random: PEFT initializes one of them with zeros, which has no effect.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in sorted(_linear_shapes(base).items()):
        down = torch.randn(RANK, columns, generator=generator) / math.sqrt(columns)
        up = torch.randn(rows, RANK, generator=generator) / math.sqrt(RANK)
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    directory.mkdir(parents=True)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, directory / _WEIGHTS)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return directory


_WEIGHTS = "adapter_model.safetensors"


def _linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Return module names and weight shapes (rows, columns) of the linear layers."""
    found = {}
    for file in sorted(base.glob("*.safetensors")):
        with file.open("rb") as stream:
            # A safetensors file: length of the header (u64, little-endian), the header (JSON), the tensors' bytes.
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            module = name.removesuffix(".weight")
            if module.rsplit(".", 1)[-1] in TARGETS:
                found[module] = tuple(entry["shape"])
    if not found:
        raise ValueError(f"{base} has none of the layers {', '.join(TARGETS)}")
    return found
