"""What wooly knows of vLLM's layer methods: how a reader comes to the Python state that post-processing leaves.

A publisher's tensors are final: post-processing has repacked, requantized or padded them. What else it left (kernel
objects, which refer to those tensors, and flags) a reader needs too, and there are two ways to it:

* *again*: the layer is bound first, and its method, which leaves final tensors alone, runs once more.
* *rehearsed*: the layer's method runs on memory that holds zeros, layer by layer, and the layer is bound afterwards
  (see :mod:`wooly_vllm.loading.rehearsal`). This suits methods that change their tensors.

A method is in the tables when publisher and reader gave stock vLLM's tokens with it, by ``benchmarks/parity.py``.
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
"""Methods that leave final tensors alone when they run once more."""

SCALES = frozenset({"Fp8KVCacheMethod", "CompressedTensorsKVCacheMethod", "BaseKVCacheMethod"})
"""Methods of attention layers that turn loaded scales into buffers and plain numbers, and are done with that: once
those are bound and set, there is nothing that they should do again."""

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
"""Methods (of compressed-tensors, their schemes) that change their layer's tensors, and come to the same Python state
whatever values those have; and the kinds of devices on which that was seen: each has kernels of its own."""

LATENT = frozenset({"Fp8LinearMethod"})
"""Those of them whose layer may be the one of which latent attention makes tensors when loading has ended."""

QUANTIZATIONS = frozenset(
    {
        *("fp8", "fp8_per_tensor", "online"),
        *("gptq", "gptq_marlin", "auto_gptq", "awq", "awq_marlin", "auto_awq", "compressed-tensors"),
    }
)
"""vLLM's names for quantizations whose layers may have methods of the tables."""


def check_quantization(name: str | None) -> None:
    """Raise :class:`UnsupportedError` for a quantization that cannot have methods of the tables."""
    if name is not None and name not in QUANTIZATIONS:
        raise UnsupportedError(f"quantization {name} is not known to come out right when it is shared")


def rehearsed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by their paths whose method changes final tensors; those with several paths once."""
    found = ((path, layer, compat.method_of(layer)) for path, layer in model.named_modules())
    return {
        path: layer for path, layer, method in found if method is not None and not leaves_final_tensors_alone(method)
    }


def check_proven(layers: Mapping[str, nn.Module], device: torch.device) -> None:
    """Raise :class:`UnsupportedError` for a layer whose method is in no table for a kind of device."""
    for path, layer in layers.items():
        kind = _kind(layer)
        if device.type not in REHEARSED.get(kind, ()):
            raise UnsupportedError(f"{path}: layers of {kind} are not known to come out right on {device.type}")
        if path.endswith(".kv_b_proj") and kind not in LATENT:
            raise UnsupportedError(f"{path}: latent attention of {kind} is not known to come out right")


def _kind(layer: nn.Module) -> str:
    """The name of a layer's method; where that leaves the work to a scheme, the scheme's."""
    return type(getattr(layer, "scheme", None) or compat.method_of(layer)).__name__


def finished_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers whose methods must not run once they are bound."""
    return (layer for layer in model.modules() if type(compat.method_of(layer)).__name__ in SCALES)


def leaves_final_tensors_alone(method: Any) -> bool:
    """Whether a method's layer may be bound first: the method can run once more, or need not."""
    kind = type(method).__name__
    if kind == "UnquantizedFusedMoEMethod":  # other backends permute the experts' weights, each time
        backend = getattr(getattr(method, "unquantized_backend", None), "name", "")
        return backend in ("TRITON", "BATCHED_TRITON") or compat.takes_final_tensors(method)
    return kind in AGAIN or kind in SCALES
