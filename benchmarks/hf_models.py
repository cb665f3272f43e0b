"""The Hugging Face benchmark's checkpoints on a CPU: what each is, how it is loaded, and how it is made once.

Relies on ``checkpoints.py``; every directory is kept in the cache that is given.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoints


@dataclass(frozen=True)
class Scenario:
    """A way to load a model.

    Attributes:
        what: in words.
        make: its checkpoint in a cache.
        dtype: that it is loaded in.
        adapters: whether every process puts LoRA weights of its own on it.
    """

    name: str
    what: str
    make: Callable[[Path], Path]
    dtype: str = "bfloat16"
    adapters: bool = False


def pickled(cache: Path) -> Path:
    """SmolLM2 as ``pytorch_model.bin``."""
    source = checkpoints.smollm2(cache)

    def make(directory: Path) -> None:
        import torch
        from safetensors.torch import load_file

        for file in ("config.json", "generation_config.json"):
            shutil.copyfile(source / file, directory / file)
        torch.save(load_file(source / "model.safetensors"), directory / "pytorch_model.bin")

    return checkpoints.made_once(cache, "SmolLM2-135M-Instruct-bin", make)


def experts(cache: Path) -> Path:
    """A random Qwen3-MoE of some 200 MiB: a tensor for each expert in files, and one for all of a layer in memory."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return checkpoints.random_model(cache, "qwen3-moe-200mb", Qwen3MoeForCausalLM, config)


SCENARIOS = (
    Scenario("smollm2_bf16", "bf16 as stored", checkpoints.smollm2),
    Scenario("smollm2_fp32", "cast to fp32", checkpoints.smollm2, dtype="float32"),
    Scenario("experts", "fused experts", experts),
    Scenario("bin", "pytorch_model.bin", pickled),
    Scenario("lora", "cast to fp32,\na LoRA adapter each", checkpoints.smollm2, dtype="float32", adapters=True),
)
