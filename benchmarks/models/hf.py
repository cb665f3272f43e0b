"""Scenarios of the benchmark ``hf`` on a CPU: checkpoints, and how transformers loads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.models.cache import made_once
from support.models.random_weights import random_checkpoint
from support.models.smollm2 import smollm2


@dataclass(frozen=True)
class Scenario:
    """A way to load a model.

    Attributes:
        name: Key in the result file.
        what: Description, as in the result file and in plots.
        make: Function that makes the checkpoint in a cache.
        dtype: Type that it is loaded in.
        adapters: Each process adds LoRA weights of its own.
    """

    name: str
    what: str
    make: Callable[[Path], Path]
    dtype: str = "bfloat16"
    adapters: bool = False


def pickled(cache: Path) -> Path:
    """Make SmolLM2 as ``pytorch_model.bin``."""
    source = smollm2(cache)

    def make(directory: Path) -> None:
        import torch
        from safetensors.torch import load_file

        for file in ("config.json", "generation_config.json"):
            shutil.copyfile(source / file, directory / file)
        torch.save(load_file(source / "model.safetensors"), directory / "pytorch_model.bin")

    return made_once(cache, "SmolLM2-135M-Instruct-bin", make)


def experts(cache: Path) -> Path:
    """Make a random Qwen3-MoE of about 200 MiB. Its experts are separate in files, and fused by transformers."""
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
    return random_checkpoint(cache, "qwen3-moe-200mb", Qwen3MoeForCausalLM, config)


SCENARIOS = (
    Scenario("smollm2_bf16", "bf16 as stored", smollm2),
    Scenario("smollm2_fp32", "cast to fp32", smollm2, dtype="float32"),
    Scenario("experts", "fused experts", experts),
    Scenario("bin", "pytorch_model.bin", pickled),
    Scenario("lora", "cast to fp32,\na LoRA adapter each", smollm2, dtype="float32", adapters=True),
)
