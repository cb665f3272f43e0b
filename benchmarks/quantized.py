"""Quantized checkpoints of the random models, in the file formats that people serve, written with torch alone.

Every linear layer's weight is quantized properly (scales from its own values, rounded to nearest); routers, embeddings
and the output layer stay as they are. Formats, as vLLM's loaders read them (``model_executor/layers/quantization``):

fp8            a scale per tensor for weights, scales for activations found at run time
fp8-static     the same, with activation scales in the checkpoint
fp8-block      a scale per 128 x 128 weights, as DeepSeek ships
gptq           4 bit, symmetric, groups of 128 rows, packed along the input
gptq-desc-act  the same, with rows in a random order (``g_idx``), as activation order leaves them
awq            4 bit with zero points, groups of 128 rows, packed and interleaved along the output
ct-int8        compressed-tensors, weights and activations of 8 bit, a scale per channel and per token
ct-fp8         the same in fp8
ct-w4a16       compressed-tensors, packed 4 bit weights, groups of 128
mxfp4          experts of gpt-oss: 4 bit floats, a power of two per 32 of them
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import families

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

GROUP = 128
BLOCK = 128
_E4M3_MAX = 448.0
_LINEAR = re.compile(
    r"\.(?:q|k|v|o|gate|up|down|kv_b|q_a|q_b|kv_a)_proj(?:_with_mqa)?\.weight$|\.experts\.\d+\.w[123]\.weight$"
)
_ACTIVATIONS = {"down_proj": 64.0, "w2": 64.0, "o_proj": 16.0}
"""Largest input that a layer of a random model sees, by the layer's name; of others, ``_NORMED``."""
_NORMED = 8.0
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that a 4 bit float can have, by its lower three bits."""
_MX_GROUP = 32


@dataclass(frozen=True)
class Method:
    """A file format.

    Attributes:
        convert: name of a layer and its weight (output x input) to what is stored: suffix, and tensor.
        config: ``quantization_config``, but for the layers that are left alone.
        left_alone: the name of the list of those; empty where there is none.
    """

    convert: Callable[[str, torch.Tensor], Tensors]
    config: dict[str, Any]
    left_alone: str = ""
    layers: re.Pattern[str] = _LINEAR


def quantized_model(family: str, method: str, cache: Path) -> Path:
    """The checkpoint directory of a random model, quantized by one of ``METHODS``; made in ``cache`` once."""
    return checkpoints.made_once(
        cache,
        f"{family}-{method}",
        lambda target: _quantize(families.random_model(family, cache), METHODS[method], target),
    )


def _quantize(source: Path, method: Method, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors: Tensors = {}
    left_alone = ["lm_head"]
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            if method.layers.search(name):
                stem = name.removesuffix(".weight")
                made = method.convert(stem, tensor.float())
                tensors |= {stem + suffix: value.contiguous() for suffix, value in made.items()}
                continue
            tensors[name] = tensor
            if tensor.dim() > 1 and name.endswith(".weight") and "embed" not in name and "lm_head" not in name:
                left_alone.append(name.removesuffix(".weight"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = method.config | ({method.left_alone: left_alone} if method.left_alone else {})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        if file.suffix == ".json" and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, target / file.name)


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _fp8(_: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / _E4M3_MAX
    return {".weight": _to_fp8(weight / scale), ".weight_scale": scale}


def _fp8_static(name: str, weight: torch.Tensor) -> Tensors:
    import torch

    largest = _ACTIVATIONS.get(name.rpartition(".")[2], _NORMED)
    return {**_fp8(name, weight), ".input_scale": torch.tensor(largest / _E4M3_MAX)}


def _fp8_block(_: str, weight: torch.Tensor) -> Tensors:
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


def _ct_int8(_: str, weight: torch.Tensor) -> Tensors:
    import torch

    values, scale = _per_channel(127.0)(weight)
    return {".weight": values.round().clamp(-128, 127).to(torch.int8), ".weight_scale": scale}


def _ct_fp8(_: str, weight: torch.Tensor) -> Tensors:
    values, scale = _per_channel(_E4M3_MAX)(weight)
    return {".weight": _to_fp8(values), ".weight_scale": scale}


def _split(values: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Divide a dimension into two: pieces, and places in a piece of a size."""
    return values.reshape(*values.shape[:dim], -1, size, *values.shape[dim + 1 :])


def _packed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight 4 bit values (0 to 15) of a matrix per int32, along dimension 0 or 1; the first in the lowest bits."""
    import torch

    parts = _split(values.to(torch.int64), dim, 8).movedim(dim + 1, -1)
    words = (parts << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _symmetric_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """4 bit values (-8 to 7) of output x input, and scales of output x groups."""
    groups = _split(weight, 1, GROUP)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).flatten(1), scale.squeeze(2)


def _ct_w4a16(_: str, weight: torch.Tensor) -> Tensors:
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
    # Zero points are stored less one; they are all 8, and a word of eight 7s is this.
    zeros = torch.full((scale.shape[1], weight.shape[0] // 8), 0x77777777, dtype=torch.int32)
    return {
        ".qweight": _packed(unordered.T + 8, 0),
        ".qzeros": zeros,
        ".scales": scale.T.to(torch.float16),
        ".g_idx": group_of.to(torch.int32),
    }


def _gptq(_: str, weight: torch.Tensor) -> Tensors:
    import torch

    return _gptq_in_order(weight, torch.arange(weight.shape[1]))


def _gptq_desc_act(name: str, weight: torch.Tensor) -> Tensors:
    """In an order that layers which are merged (q, k and v; gate and up) have in common, as they have their input."""
    import torch

    merged = re.sub(r"\.(?:[qkv]|gate|up)_proj$", "", name)
    generator = torch.Generator().manual_seed(sum(merged.encode()))
    return _gptq_in_order(weight, torch.randperm(weight.shape[1], generator=generator))


def _awq(_: str, weight: torch.Tensor) -> Tensors:
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


def _mxfp4(_: str, weight: torch.Tensor) -> Tensors:
    """``weight``: experts x input x output, as transformers stores them; blocks are along the input."""
    import torch

    values = _split(weight.transpose(1, 2), 2, _MX_GROUP)
    exponent = (values.abs().amax(dim=3, keepdim=True).clamp(min=2.0**-100) / 6).log2().ceil()
    scaled = values / exponent.exp2()
    code = (scaled.abs().unsqueeze(-1) - torch.tensor(_E2M1)).abs().argmin(dim=-1) + 8 * (scaled < 0)
    code = code.to(torch.uint8)
    return {"_blocks": code[..., ::2] | (code[..., 1::2] << 4), "_scales": (exponent.squeeze(3) + 127).to(torch.uint8)}


def _compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
    }


def _arguments(
    bits: int, kind: str, strategy: str, *, dynamic: bool = False, group: int | None = None
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": group,
    }


def _of_channels_and_tokens(bits: int, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return _arguments(bits, kind, "channel"), _arguments(bits, kind, "token", dynamic=True)


_FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
    "desc_act": False,
    "lm_head": False,
    "checkpoint_format": "gptq",
}

METHODS: dict[str, Method] = {
    "fp8": Method(_fp8, _FP8_CONFIG, "ignored_layers"),
    "fp8-static": Method(_fp8_static, {**_FP8_CONFIG, "activation_scheme": "static"}, "ignored_layers"),
    "fp8-block": Method(_fp8_block, {**_FP8_CONFIG, "weight_block_size": [BLOCK, BLOCK]}, "ignored_layers"),
    "gptq": Method(_gptq, _GPTQ_CONFIG),
    "gptq-desc-act": Method(_gptq_desc_act, {**_GPTQ_CONFIG, "desc_act": True}),
    "awq": Method(
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "modules_to_not_convert",
    ),
    "ct-int8": Method(_ct_int8, _compressed("int-quantized", *_of_channels_and_tokens(8, "int")), "ignore"),
    "ct-fp8": Method(_ct_fp8, _compressed("float-quantized", *_of_channels_and_tokens(8, "float")), "ignore"),
    "ct-w4a16": Method(
        _ct_w4a16, _compressed("pack-quantized", _arguments(4, "int", "group", group=GROUP), None), "ignore"
    ),
    "mxfp4": Method(
        _mxfp4,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        layers=re.compile(r"\.experts\.(?:gate_up|down)_proj$"),
    ),
}
"""File formats by name."""
