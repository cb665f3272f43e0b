"""Quantize one weight matrix into the tensors that a file format stores, with torch alone.

Each public function takes the name of a layer and its weight (output x input, fp32) and returns the stored tensors by
suffix. Scales come from the weight's own values, rounded to nearest. The formats are those that vLLM's loaders read
(``model_executor/layers/quantization``); ``quantized.py`` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

GROUP = 128
"""Input rows that share a scale in the 4-bit formats."""
BLOCK = 128
"""Side of the square block that shares a scale in ``fp8-block``."""
_E4M3_MAX = 448.0
_ACTIVATIONS = {"down_proj": 64.0, "w2": 64.0, "o_proj": 16.0}
"""Largest input of a layer in a random model, by the layer's name. ``_NORMED`` for all others."""
_NORMED = 8.0
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float, by its lower three bits."""
_MX_GROUP = 32


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def fp8(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to fp8 with one scale for the tensor."""
    scale = weight.abs().max() / _E4M3_MAX
    return {".weight": _to_fp8(weight / scale), ".weight_scale": scale}


def fp8_static(name: str, weight: torch.Tensor) -> Tensors:
    """Quantize to fp8 and add a fixed scale for activations."""
    import torch

    largest = _ACTIVATIONS.get(name.rpartition(".")[2], _NORMED)
    return {**fp8(name, weight), ".input_scale": torch.tensor(largest / _E4M3_MAX)}


def fp8_block(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to fp8 with one scale per block of 128 x 128 weights."""
    import torch

    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12) / _E4M3_MAX
    stored = _to_fp8(blocks / scale).view(padded.shape)[:rows, :columns]
    return {".weight": stored, ".weight_scale_inv": scale.view(down, across)}


def _per_channel(largest: float) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def scaled(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / largest
        return weight / scale, scale

    return scaled


def ct_int8(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to int8 with one scale per output channel (compressed-tensors)."""
    import torch

    values, scale = _per_channel(127.0)(weight)
    return {".weight": values.round().clamp(-128, 127).to(torch.int8), ".weight_scale": scale}


def ct_fp8(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to fp8 with one scale per output channel (compressed-tensors)."""
    values, scale = _per_channel(_E4M3_MAX)(weight)
    return {".weight": _to_fp8(values), ".weight_scale": scale}


def _split(values: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Split dimension ``dim`` in two: pieces of length ``size``, and positions in a piece."""
    return values.reshape(*values.shape[:dim], -1, size, *values.shape[dim + 1 :])


def _packed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Pack eight 4-bit values (0 to 15) of a matrix per int32 along ``dim`` (0 or 1), the first in the lowest bits."""
    import torch

    parts = _split(values.to(torch.int64), dim, 8).movedim(dim + 1, -1)
    words = (parts << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _symmetric_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 4-bit values (-8 to 7; output x input) and their scales (output x groups)."""
    groups = _split(weight, 1, GROUP)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).flatten(1), scale.squeeze(2)


def ct_w4a16(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to packed 4-bit values in groups of 128 (compressed-tensors)."""
    import torch

    values, scale = _symmetric_groups(weight)
    return {
        ".weight_packed": _packed(values + 8, 1),
        ".weight_scale": scale.to(torch.bfloat16),
        ".weight_shape": torch.tensor(weight.shape),
    }


def _gptq_in_order(weight: torch.Tensor, order: torch.Tensor) -> Tensors:
    import torch

    values, scale = _symmetric_groups(weight[:, order])
    unordered = torch.empty_like(values)
    unordered[:, order] = values
    group_of = torch.empty_like(order)
    group_of[order] = torch.arange(len(order)) // GROUP
    # The format stores zero points minus one. All of them are 8, so each word is eight 7s.
    zeros = torch.full((scale.shape[1], weight.shape[0] // 8), 0x77777777, dtype=torch.int32)
    return {
        ".qweight": _packed(unordered.T + 8, 0),
        ".qzeros": zeros,
        ".scales": scale.T.to(torch.float16),
        ".g_idx": group_of.to(torch.int32),
    }


def gptq(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to symmetric 4-bit values in groups of 128 rows, packed along the input."""
    import torch

    return _gptq_in_order(weight, torch.arange(weight.shape[1]))


def gptq_desc_act(name: str, weight: torch.Tensor) -> Tensors:
    """Quantize as :func:`gptq`, with the rows in a random order (``g_idx``).

    Layers that an engine merges (q, k and v; gate and up) share an input, and so the order.
    """
    import torch

    merged = re.sub(r"\.(?:[qkv]|gate|up)_proj$", "", name)
    generator = torch.Generator().manual_seed(sum(merged.encode()))
    return _gptq_in_order(weight, torch.randperm(weight.shape[1], generator=generator))


def awq(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to 4-bit values with zero points, packed and interleaved along the output."""
    import torch

    groups = _split(weight.T, 0, GROUP)  # groups x GROUP x output
    low, high = groups.amin(dim=1, keepdim=True).clamp(max=0), groups.amax(dim=1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    values = ((groups / scale).round() + zero).clamp(0, 15).flatten(0, 1)

    def interleaved(packing: torch.Tensor) -> torch.Tensor:
        return _packed(_split(packing, 1, 8)[:, :, list(_AWQ_ORDER)].flatten(1), 1)

    return {
        ".qweight": interleaved(values),
        ".qzeros": interleaved(zero.squeeze(1)),
        ".scales": scale.squeeze(1).to(torch.float16),
    }


def mxfp4(_: str, weight: torch.Tensor) -> Tensors:
    """Quantize to 4-bit floats, with one power of two per 32 of them along the input.

    ``weight`` is experts x input x output, as transformers stores it.
    """
    import torch

    values = _split(weight.transpose(1, 2), 2, _MX_GROUP)
    exponent = (values.abs().amax(dim=3, keepdim=True).clamp(min=2.0**-100) / 6).log2().ceil()
    scaled = values / exponent.exp2()
    code = (scaled.abs().unsqueeze(-1) - torch.tensor(_E2M1)).abs().argmin(dim=-1) + 8 * (scaled < 0)
    code = code.to(torch.uint8)
    return {"_blocks": code[..., ::2] | (code[..., 1::2] << 4), "_scales": (exponent.squeeze(3) + 127).to(torch.uint8)}
