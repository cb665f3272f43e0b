"""Draft models for speculative decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

LAYERS = 1


def eagle_head(target: Path, directory: Path, *, seed: int = 3) -> Path:
    """Write a random EAGLE head for a llama-like model; embeddings and output layer are the target's."""
    import torch
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    (directory / "config.json").write_text(json.dumps(config))
    for file in target.glob("tokenizer*"):
        shutil.copy(file, directory)
    layer = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(target / "model.safetensors").items()
        if name.startswith("model.layers.0.")
        and "input_layernorm" not in name  # none before its first layer, as in EAGLE
    }
    generator = torch.Generator().manual_seed(seed)
    width = config["hidden_size"]
    layer["fc.weight"] = (torch.randn(width, 2 * width, generator=generator) * 0.1).to(torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in layer.items()}, directory / "model.safetensors")
    return directory
