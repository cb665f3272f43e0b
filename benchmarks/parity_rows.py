"""The rows of the parity matrix: which models, in which formats and types, with or without CUDA graphs.

A row that a machine cannot run is still a row: what stock vLLM says to it is in the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import quantized

BASE = "llama"
SPARSE_BASE = "qwen3-moe"
ONLINE = {"online-fp8": "fp8", "online-bitsandbytes": "bitsandbytes"}
"""Formats that vLLM itself makes of a bf16 checkpoint, and its names for them."""
_WITH_SLOPES = ("bloom", "mpt")
_WITH_IMAGES = ("qwen2-vl", "llava")
_BOTH_WAYS = (BASE, SPARSE_BASE, "mixtral", "deepseek-v2", "deepseek-v3")
"""Models that a GPU runs with and without CUDA graphs; the others with them."""


@dataclass(frozen=True)
class Row:
    """A model as an engine is to run it.

    Attributes:
        model: one of ``families.FAMILIES``.
        quantization: one of ``quantized.METHODS``, of ``ONLINE``, or "none".
        dtype: of activations, and of weights that are not quantized.
        graphs: whether with torch.compile and CUDA graphs.
        arguments: of the engine, beyond those that the other fields mean.
        cpu: whether a machine without a GPU runs it.
        gpu: whether a machine with one does.
    """

    model: str
    quantization: str = "none"
    dtype: str = "bfloat16"
    graphs: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)
    cpu: bool = False
    gpu: bool = True

    @property
    def name(self) -> str:
        """What it is known by in results and on the command line."""
        return "/".join((self.model, self.quantization, self.dtype, "graphs" if self.graphs else "eager"))

    @property
    def sparse(self) -> bool:
        """Whether it has experts: vLLM makes its groups for them with a process's first model, or never."""
        return families.FAMILIES[self.model].sparse

    @property
    def embeds(self) -> bool:
        """Whether it answers with embeddings."""
        return families.FAMILIES[self.model].embeds

    def checkpoint(self, cache: Path) -> Path:
        """The checkpoint's directory, made in a cache if it is not there yet."""
        if self.quantization in quantized.METHODS:
            return quantized.quantized_model(self.model, self.quantization, cache)
        return families.random_model(self.model, cache)

    def settings(self, *, on_gpu: bool) -> dict[str, Any]:
        """Arguments of the engine, but for the model and the load format.

        On a GPU the KV cache is small, so that a dozen engines are at home there at once.
        """
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 512,
            "dtype": self.dtype,
            "seed": 0,
            "disable_log_stats": True,
            # What is in the prefix cache is computed by other kernels, with other last bits, also in stock vLLM.
            "enable_prefix_caching": False,
            "enforce_eager": not self.graphs,
        }
        if self.graphs:
            settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4]}
            if self.quantization != "none":  # graphs alone: that also compiled code is right the other rows show
                settings["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        if on_gpu and self.model in _WITH_SLOPES:  # not every build of FlashAttention takes them
            settings["attention_backend"] = "TRITON_ATTN"
        if on_gpu:
            settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 256 << 20}
        if self.quantization in ONLINE:
            settings["quantization"] = ONLINE[self.quantization]
        if self.embeds:
            settings |= {"skip_tokenizer_init": False, "runner": "pooling"}
        if self.model in _WITH_IMAGES:  # the vision tower is loaded because images may come
            settings |= {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
        return settings | self.arguments


def _dtypes() -> Iterator[Row]:
    for dtype in ("float16", "float32"):
        yield Row(BASE, dtype=dtype)
        yield Row(BASE, dtype=dtype, graphs=False, cpu=True)


def _architectures() -> Iterator[Row]:
    for model in families.FAMILIES:
        yield Row(model)
        yield Row(model, graphs=False, cpu=True, gpu=model in _BOTH_WAYS)


def _quantized() -> Iterator[Row]:
    both = [(base, method) for base in (BASE, SPARSE_BASE) for method in quantized.METHODS if method != "mxfp4"]
    both += [("deepseek-v3", "fp8-block"), ("gpt-oss", "mxfp4")]
    both += [(base, "online-fp8") for base in (BASE, SPARSE_BASE)] + [(BASE, "online-bitsandbytes")]
    for model, method in both:
        yield Row(model, method)
        yield Row(model, method, graphs=False, cpu=True)
    for method in ("gptq", "awq"):  # their scales are fp16, and older kernels know no other type
        yield Row(BASE, method, dtype="float16", graphs=False, cpu=True)


ROWS: dict[str, Row] = {row.name: row for row in (*_architectures(), *_dtypes(), *_quantized())}
"""All rows, by name."""
