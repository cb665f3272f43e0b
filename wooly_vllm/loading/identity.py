"""The facts of a weight key: every setting that must be equal for two vLLM processes to share final tensors.

In doubt a setting is included. One too many costs another load (equal tensors are still deduplicated); one too few
would serve wrong weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from typing import Any

import torch

from shared_store.base import manifest
from shared_store.base.errors import UnsupportedError
from shared_store.base.keys import without_names
from shared_store.torch.devices import store_device
from wooly_vllm import compat
from wooly_vllm.loading import methods

LAYOUT = 2
"""Increased when wooly itself changes final tensors, for example in linear layers on a CPU."""

_KERNEL_VARIABLES = re.compile(
    r"^VLLM_.*(USE|KERNEL|BACKEND|MOE|FP8|FP4|MARLIN|GEMM|SGL|PREPACK|LAYOUT|PADDING|INVARIANT|CONTIG|LINEAR|CUTLASS)"
)


def check_supported(vllm_config: Any, model_config: Any, load_config: Any, *, unproven: bool = False) -> None:
    """Raise :class:`UnsupportedError` for settings that are known not to work with shared weights.

    Args:
        vllm_config: vLLM's.
        model_config: vLLM's.
        load_config: vLLM's.
        unproven: accept quantizations that were not compared with stock vLLM.
    """
    if not unproven:
        methods.check_quantization(model_config.quantization)
    if getattr(vllm_config.parallel_config, "enable_eplb", False):
        raise UnsupportedError("expert load balancing (EPLB) rearranges experts in place")
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise UnsupportedError("weights from a trainer (weight transfer) are written in place")
    if (
        getattr(getattr(vllm_config, "offload_config", None), "uva", None)
        and vllm_config.offload_config.uva.cpu_offload_gb
    ):
        raise UnsupportedError("weights that are offloaded to the CPU are private")
    if getattr(vllm_config.cache_config, "cpu_offload_gb", 0):
        raise UnsupportedError("weights that are offloaded to the CPU are private")
    if load_config.device is not None and torch.device(load_config.device).type != compat.device_of(vllm_config).type:
        raise UnsupportedError(f"the load device {load_config.device} differs from the engine's")
    if compat.device_of(vllm_config).type not in ("cpu", "cuda"):
        raise UnsupportedError(f"weights on {compat.device_of(vllm_config).type} cannot be shared")


def facts(vllm_config: Any, model_config: Any, inner_load_format: str) -> dict[str, Any]:
    """Return every setting that shapes the final tensors, in plain JSON types."""
    cls = compat.model_class(model_config)
    scheduler = vllm_config.scheduler_config
    return {
        "engine": "vllm",
        "versions": {
            "vllm": compat.version(),
            "torch": str(torch.__version__),
            "layout": LAYOUT,
            "manifest": manifest.SCHEMA,
        },
        "model": f"{cls.__module__}.{cls.__qualname__}",
        "config": without_names(json.loads(model_config.hf_config.to_json_string(use_diff=False))),
        "load_format": inner_load_format,
        "dtype": str(model_config.dtype),
        "quantization": [model_config.quantization, repr(getattr(model_config, "quantization_config", None))],
        "runner": [str(getattr(model_config, name, None)) for name in ("runner_type", "convert_type")],
        "untied": bool(getattr(model_config, "word_embeddings_untied_by_checkpoint", False)),
        "parallel": compat.parallel_ranks(vllm_config, model_config),
        "kernels": _plain(getattr(vllm_config, "kernel_config", None)),
        "lora": _lora(vllm_config.lora_config),
        # Some buffers have one row for each position, token or sequence.
        "lengths": [model_config.max_model_len, scheduler.max_num_batched_tokens, scheduler.max_num_seqs],
        "device": _processor(compat.device_of(vllm_config)),
        "environment": {name: text for name, text in os.environ.items() if _KERNEL_VARIABLES.match(name)},
    }


def _lora(config: Any) -> Any:
    """Return the LoRA settings that may shape the base model; for some layers, LoRA as such does.

    Buffers for adapters are allocated after loading, so their sizes are left out: servers with other ranks share.
    """
    if not config:
        return None
    return {name: value for name, value in _plain(config).items() if name not in _SIZES_OF_ADAPTERS}


_SIZES_OF_ADAPTERS = ("max_lora_rank", "max_loras", "max_cpu_loras", "lora_dtype", "target_modules")


def _plain(settings: Any) -> Any:
    """Return the fields of a configuration object; values that are not plain as text, without addresses."""
    if not dataclasses.is_dataclass(settings):
        return None
    values = {field.name: getattr(settings, field.name, None) for field in dataclasses.fields(settings)}
    simple = (str, int, float, bool, type(None))
    return {
        name: value if isinstance(value, simple) else re.sub(r"0x[0-9a-f]+", "", repr(value))
        for name, value in values.items()
    }


def _processor(device: torch.device) -> dict[str, Any]:
    """Return the device, and its properties that select kernels and so weight layouts."""
    if device.type == "cuda":
        return {"id": store_device(device), "capability": torch.cuda.get_device_capability(device)}
    return {
        "id": "cpu",
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
    }
