"""The checkpoints that tests load: one tiny random model per family, and copies with one tensor changed.

Each is a few MiB of bf16 safetensors with tensors on both sides of 16 KiB (small ones are copied into a process, large
ones are mapped). They run in vLLM with ``skip_tokenizer_init=True`` and prompt token ids below ``VOCABULARY``.
Directories are made once per cache directory and kept; see ``checkpoints.py`` in ``benchmarks``.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import TYPE_CHECKING, Any

import checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOCABULARY = 2048
"""Size of every random model's vocabulary; the tokenizer uses the first 259 ids."""

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def _llama(**changes: Any) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM, LlamaConfig(**{**_DECODER, **changes})


def _llama_tied() -> tuple[Any, Any]:
    return _llama(tie_word_embeddings=True)


def _qwen2() -> tuple[Any, Any]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM, Qwen2Config(**_DECODER)


def _qwen3() -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM, Qwen3Config(**_DECODER, head_dim=32)


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    # One sliding and one full layer: each kind has a rotary table of its own.
    layers = ["sliding_attention", "full_attention"]
    own = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 128, "layer_types": layers}
    # Gemma scales embeddings by sqrt(hidden_size) and norms what its layers add. Under 0.2, or with tied embeddings,
    # the last token drowns all that and is repeated.
    return Gemma3ForCausalLM, Gemma3TextConfig(**{**_DECODER, **own, "initializer_range": 0.05})


def _gpt2() -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 512}
    return GPT2LMHeadModel, GPT2Config(**_TOKENS, **shape, initializer_range=0.2)


def _bloom() -> tuple[Any, Any]:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM, BloomConfig(**_TOKENS, hidden_size=256, n_layer=2, n_head=8, initializer_range=0.2)


def _mixtral() -> tuple[Any, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM, MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": _llama,
    "llama-tied": _llama_tied,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "mixtral": _mixtral,
}
"""Name of a random model to a function that gives its transformers class and config."""


def random_model(family: str, cache: Path) -> Path:
    """The checkpoint directory of one of ``FAMILIES``, made in ``cache`` if it is not there yet."""
    model_class, config = FAMILIES[family]()
    return checkpoints.random_model(cache, family, model_class, config)


def smollm2(cache: Path) -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct (bf16, with its tokenizer), made in ``cache`` once."""
    return checkpoints.smollm2(cache)


def zero_one_norm(source: Path, target: Path) -> str:
    """Copy a checkpoint and zero one norm's weight in the copy; returns that tensor's name.

    Names, shapes, file sizes and modification times stay as in ``source``: all that differs is the bytes of one tensor.
    """
    shutil.copytree(source, target)
    for file in sorted(target.glob("*.safetensors")):
        before = file.stat()
        with file.open("r+b") as stream:
            # A safetensors file: length of the header (u64, little-endian), the header (JSON), the tensors' bytes.
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
            norms = sorted(name for name, entry in header.items() if _is_norm(name, entry))
            if not norms:
                continue
            start, end = header[norms[0]]["data_offsets"]
            stream.seek(8 + length + start)
            if not any(stream.read(end - start)):
                raise ValueError(f"{norms[0]} of {source} is zero already: the copy would not differ")
            stream.seek(8 + length + start)
            stream.write(bytes(end - start))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return norms[0]
    raise ValueError(f"no norm weight in the safetensors files of {source}")


def _is_norm(name: str, entry: dict[str, Any]) -> bool:
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    is_norm = "norm" in last or last.startswith("ln_")
    return name.endswith(".weight") and is_norm and len(entry["shape"]) == 1
