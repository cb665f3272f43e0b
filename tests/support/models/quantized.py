"""Quantized checkpoints of the random models, in the file formats that people serve.

Quantizes the weight of every linear layer. Routers, embeddings and the output layer keep their values. Formats:

fp8            one scale per tensor for weights; scales for activations computed at run time
fp8-static     the same, with activation scales in the checkpoint
fp8-block      one scale per 128 x 128 weights, as in DeepSeek's checkpoints
gptq           4-bit, symmetric, groups of 128 rows, packed along the input
gptq-desc-act  the same, with rows in a random order (``g_idx``), as activation order produces
awq            4-bit with zero points, groups of 128 rows, packed and interleaved along the output
ct-int8        compressed-tensors, weights and activations of 8 bits, one scale per channel and per token
ct-fp8         the same in fp8
ct-w4a16       compressed-tensors, packed 4-bit weights, groups of 128
mxfp4          experts of gpt-oss: 4-bit floats, one power of two per 32 of them
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.models import families, packing
from support.models.cache import made_once

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_LINEAR = re.compile(
    r"\.(?:q|k|v|o|gate|up|down|kv_b|q_a|q_b|kv_a)_proj(?:_with_mqa)?\.weight$|\.experts\.\d+\.w[123]\.weight$"
)


@dataclass(frozen=True)
class Method:
    """A file format.

    Attributes:
        convert: Function from a layer's name and weight (output x input) to the stored tensors by suffix.
        config: The ``quantization_config``, without the list of unquantized layers.
        unquantized_key: Key of that list in the config; empty if the format has none.
        layers: Pattern of the tensor names that are quantized.
    """

    convert: Callable[[str, torch.Tensor], Tensors]
    config: dict[str, Any]
    unquantized_key: str = ""
    layers: re.Pattern[str] = _LINEAR


def quantized_model(family: str, method: str, cache: Path) -> Path:
    """Return the checkpoint directory of a random model, quantized by one of ``METHODS``; make it in ``cache`` once."""
    return made_once(
        cache,
        f"{family}-{method}",
        lambda target: _quantize(families.random_model(family, cache), METHODS[method], target),
    )


def _quantize(source: Path, method: Method, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors: Tensors = {}
    unquantized = ["lm_head"]
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            if method.layers.search(name):
                stem = name.removesuffix(".weight")
                made = method.convert(stem, tensor.float())
                tensors |= {stem + suffix: value.contiguous() for suffix, value in made.items()}
                continue
            tensors[name] = tensor
            if tensor.dim() > 1 and name.endswith(".weight") and "embed" not in name and "lm_head" not in name:
                unquantized.append(name.removesuffix(".weight"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = method.config | (
        {method.unquantized_key: unquantized} if method.unquantized_key else {}
    )
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        if file.suffix == ".json" and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, target / file.name)


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
    "group_size": packing.GROUP,
    "sym": True,
    "desc_act": False,
    "lm_head": False,
    "checkpoint_format": "gptq",
}

METHODS: dict[str, Method] = {
    "fp8": Method(packing.fp8, _FP8_CONFIG, "ignored_layers"),
    "fp8-static": Method(packing.fp8_static, {**_FP8_CONFIG, "activation_scheme": "static"}, "ignored_layers"),
    "fp8-block": Method(
        packing.fp8_block, {**_FP8_CONFIG, "weight_block_size": [packing.BLOCK, packing.BLOCK]}, "ignored_layers"
    ),
    "gptq": Method(packing.gptq, _GPTQ_CONFIG),
    "gptq-desc-act": Method(packing.gptq_desc_act, {**_GPTQ_CONFIG, "desc_act": True}),
    "awq": Method(
        packing.awq,
        {"quant_method": "awq", "bits": 4, "group_size": packing.GROUP, "zero_point": True, "version": "gemm"},
        "modules_to_not_convert",
    ),
    "ct-int8": Method(packing.ct_int8, _compressed("int-quantized", *_of_channels_and_tokens(8, "int")), "ignore"),
    "ct-fp8": Method(packing.ct_fp8, _compressed("float-quantized", *_of_channels_and_tokens(8, "float")), "ignore"),
    "ct-w4a16": Method(
        packing.ct_w4a16,
        _compressed("pack-quantized", _arguments(4, "int", "group", group=packing.GROUP), None),
        "ignore",
    ),
    "mxfp4": Method(
        packing.mxfp4,
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
