"""The rows of the parity matrix: models, formats and types, with and without CUDA graphs.

A row that a machine cannot run is still a row: the result is stock vLLM's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.models import families, quantized

BASE = "llama"
SPARSE_BASE = "qwen3-moe"
ONLINE = {"online-fp8": "fp8", "online-bitsandbytes": "bitsandbytes"}
"""Formats that vLLM itself makes of a bf16 checkpoint, and vLLM's names for them."""
_WITH_SLOPES = ("bloom", "mpt")
_WITH_IMAGES = ("qwen2-vl", "llava")
_BOTH_WAYS = (BASE, SPARSE_BASE, "mixtral", "deepseek-v2", "deepseek-v3")
"""Models that a GPU runs both with and without CUDA graphs. It runs the others with graphs only."""


@dataclass(frozen=True)
class Row:
    """A model, and the way an engine runs it.

    Attributes:
        model: One of ``families.FAMILIES``.
        quantization: One of ``quantized.METHODS``, of ``ONLINE``, or "none".
        dtype: Type of activations, and of weights that are not quantized.
        graphs: Use torch.compile and CUDA graphs.
        arguments: Arguments of the engine in addition to those implied by the other fields.
        cpu: Machines without a GPU run this row.
        gpu: Machines with a GPU run this row.
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
        """Name in results and on the command line."""
        return "/".join((self.model, self.quantization, self.dtype, "graphs" if self.graphs else "eager"))

    @property
    def sparse(self) -> bool:
        """True for a mixture-of-experts model. vLLM creates its expert groups with a process's first model only."""
        return families.FAMILIES[self.model].sparse

    @property
    def embeds(self) -> bool:
        """True if the answers are embeddings."""
        return families.FAMILIES[self.model].embeds

    def checkpoint(self, cache: Path) -> Path:
        """Return the checkpoint directory; make it in ``cache`` if it does not exist."""
        if self.quantization in quantized.METHODS:
            return quantized.quantized_model(self.model, self.quantization, cache)
        return families.random_model(self.model, cache)

    def settings(self, *, on_gpu: bool) -> dict[str, Any]:
        """Return the arguments of the engine, without model and load format.

        On a GPU the KV cache is small, so that a dozen engines fit at the same time.
        """
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 512,
            "dtype": self.dtype,
            "seed": 0,
            "disable_log_stats": True,
            # Cached prefixes are computed by other kernels, whose results differ in the last bits, also in stock vLLM.
            "enable_prefix_caching": False,
            "enforce_eager": not self.graphs,
        }
        if self.graphs:
            settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4]}
            if self.quantization != "none":  # graphs only; unquantized rows cover compiled code
                settings["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        if on_gpu and self.model in _WITH_SLOPES:  # not every build of FlashAttention supports slopes
            settings["attention_backend"] = "TRITON_ATTN"
        if on_gpu:
            settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 256 << 20}
        if self.quantization in ONLINE:
            settings["quantization"] = ONLINE[self.quantization]
        if self.embeds:
            settings |= {"skip_tokenizer_init": False, "runner": "pooling"}
        if self.model in _WITH_IMAGES:  # allow images, so that the vision tower is loaded
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
    for method in ("gptq", "awq"):  # their scales are fp16, the only type of older kernels
        yield Row(BASE, method, dtype="float16", graphs=False, cpu=True)


ROWS: dict[str, Row] = {row.name: row for row in (*_architectures(), *_dtypes(), *_quantized())}
"""All rows, by name."""
