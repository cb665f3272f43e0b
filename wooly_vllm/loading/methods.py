"""vLLM's layer methods: how a reader gets the Python state that their post-processing leaves.

A publisher's tensors are final: post-processing has repacked, requantized or padded them. It also leaves Python state:
kernel objects that refer to those tensors, and flags. A reader gets that state in one of two ways:

* *again*: the layer is bound first, and its method, which does not change final tensors, runs again.
* *rehearsed*: the method runs on zeros, layer by layer, and the layer is bound afterwards (see
  :mod:`wooly_vllm.loading.rehearsal`). This is for methods that change their tensors.

A method is in these tables if publisher and reader produced stock vLLM's tokens with it, in the parity benchmark.
Models with any other method are loaded the stock way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shared_store.base.errors import UnsupportedError
from wooly_vllm import compat

AGAIN = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})
"""Methods that do not change final tensors when they run again."""

SCALES = frozenset({"Fp8KVCacheMethod", "CompressedTensorsKVCacheMethod", "BaseKVCacheMethod"})
"""Methods of attention layers that turn loaded scales into buffers and numbers. They must not run again after those
are bound and set."""

REHEARSED: dict[str, tuple[str, ...]] = {
    "AutoAWQMarlinLinearMethod": ("cpu", "cuda"),
    "AutoAWQMoEMethod": ("cuda",),
    "AutoGPTQLinearMethod": ("cpu", "cuda"),
    "AutoGPTQMoEMethod": ("cuda",),
    "CompressedTensorsW8A8Fp8": ("cpu", "cuda"),
    "CompressedTensorsW8A8Fp8MoEMethod": ("cuda",),
    "CompressedTensorsW8A8Int8": ("cuda",),
    "CompressedTensorsW8A8Int8MoEMethod": ("cuda",),
    "CompressedTensorsWNA16": ("cpu", "cuda"),
    "CompressedTensorsWNA16MarlinMoEMethod": ("cuda",),
    "Fp8LinearMethod": ("cuda",),
    "Fp8MoEMethod": ("cuda",),
    "Fp8PerTensorOnlineLinearMethod": ("cuda",),
    "Fp8PerTensorOnlineMoEMethod": ("cuda",),
}
"""Methods (of compressed-tensors: schemes) that change their layer's tensors, and whose Python state does not depend on
the tensors' values; with the kinds of devices on which that was verified, because each has other kernels."""

LATENT = frozenset({"Fp8LinearMethod"})
"""Rehearsed methods that are verified for ``kv_b_proj``, from which latent attention makes tensors after loading."""

QUANTIZATIONS = frozenset(
    {
        *("fp8", "fp8_per_tensor", "online"),
        *("gptq", "gptq_marlin", "auto_gptq", "awq", "awq_marlin", "auto_awq", "compressed-tensors"),
    }
)
"""vLLM's names of quantizations whose layers may have methods of these tables."""


def check_quantization(name: str | None) -> None:
    """Raise :class:`UnsupportedError` for a quantization without methods in the tables."""
    if name is not None and name not in QUANTIZATIONS:
        raise UnsupportedError(f"quantization {name} was not verified with shared weights")


def rehearsed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose method changes final tensors, by path; each layer once."""
    found = ((path, layer, compat.method_of(layer)) for path, layer in model.named_modules())
    return {path: layer for path, layer, method in found if method is not None and not keeps_final_tensors(method)}


def check_proven(layers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Raise :class:`UnsupportedError` for a layer whose method is not in the tables for a device."""
    for path, layer in layers.items():
        kind = _kind(layer)
        if device.type not in REHEARSED.get(kind, ()):
            raise UnsupportedError(f"{path}: layers of {kind} were not verified with shared weights on {device.type}")
        if path.endswith(".kv_b_proj") and kind not in LATENT:
            raise UnsupportedError(f"{path}: latent attention of {kind} was not verified with shared weights")


def _kind(layer: nn.Module) -> str:
    """Return the class name of a layer's method, or of the scheme that the method delegates to."""
    return type(getattr(layer, "scheme", None) or compat.method_of(layer)).__name__


def finished_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the layers whose methods must not run after they are bound."""
    return (layer for layer in model.modules() if type(compat.method_of(layer)).__name__ in SCALES)


def keeps_final_tensors(method: Any) -> bool:
    """Return True if a method's layer may be bound first: the method can run again, or need not."""
    kind = type(method).__name__
    if kind == "UnquantizedFusedMoEMethod":  # other backends permute the experts' weights each time
        backend = getattr(getattr(method, "unquantized_backend", None), "name", "")
        return backend in ("TRITON", "BATCHED_TRITON") or compat.takes_final_tensors(method)
    return kind in AGAIN or kind in SCALES
