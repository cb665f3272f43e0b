"""Quantized checkpoints contain the weights that they were made of, within the precision of their formats.

The readers here follow the definitions of the formats and share no code with the writers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402 - these need torch
from support.models import families, quantized  # noqa: E402

LAYER = "model.layers.1.mlp.down_proj"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def _nibble(words, place):
    return (words.to(torch.int64) >> (4 * place)) & 15


def _gptq(stored):
    """Row ``8 * i + place`` of the input is nibble ``place`` of word ``i``; zero points are stored minus one."""
    words, group = stored["qweight"], stored["g_idx"].to(torch.int64)
    values = torch.empty(len(group), words.shape[1])
    zeros = torch.empty(stored["scales"].shape)
    for place in range(8):
        values[place::8] = _nibble(words, place).float()
        zeros[:, place::8] = _nibble(stored["qzeros"], place).float() + 1
    return ((values - zeros[group]) * stored["scales"].float()[group]).T


def _awq(stored):
    """Nibble ``place`` of a word is column ``(0, 2, 4, 6, 1, 3, 5, 7)[place]`` of the word's eight."""
    scales = stored["scales"].float()
    values, zeros = torch.empty(stored["qweight"].shape[0], scales.shape[1]), torch.empty(scales.shape)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        values[:, column::8] = _nibble(stored["qweight"], place).float()
        zeros[:, column::8] = _nibble(stored["qzeros"], place).float()
    rows = len(values) // len(scales)
    return ((values - zeros.repeat_interleave(rows, 0)) * scales.repeat_interleave(rows, 0)).T


def _ct_w4a16(stored):
    shape = stored["weight_shape"].tolist()
    values = torch.empty(shape)
    for place in range(8):
        values[:, place::8] = _nibble(stored["weight_packed"], place).float() - 8
    scale = stored["weight_scale"].float()
    return values * scale.repeat_interleave(shape[1] // scale.shape[1], 1)


def _scaled(stored):
    return stored["weight"].float() * stored["weight_scale"].float()


def _block(stored):
    scale = stored["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    rows, columns = stored["weight"].shape
    return stored["weight"].float() * scale[:rows, :columns]


READERS = {
    "fp8": (_scaled, 0.05),
    "fp8-static": (_scaled, 0.05),
    "fp8-block": (_block, 0.05),
    "gptq": (_gptq, 0.15),
    "gptq-desc-act": (_gptq, 0.15),
    "awq": (_awq, 0.15),
    "ct-int8": (_scaled, 0.02),
    "ct-fp8": (_scaled, 0.05),
    "ct-w4a16": (_ct_w4a16, 0.15),
}
"""Reader of each format, and the tolerated standard deviation of the error, relative to that of the weights."""


@pytest.mark.parametrize("method", READERS)
def test_weights_are_equal_within_the_precision_of_the_format(method, cache):
    """A wrong order of nibbles, rows or groups would give an error as large as the weights."""
    original = load_file(families.random_model("llama", cache) / "model.safetensors")[f"{LAYER}.weight"].float()
    tensors = load_file(quantized.quantized_model("llama", method, cache) / "model.safetensors")
    stored = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in tensors.items() if name.startswith(LAYER)}
    read, tolerated = READERS[method]
    assert (read(stored) - original).std() < tolerated * original.std()


def test_experts_of_gpt_oss_are_equal_within_the_precision_of_mxfp4(cache):
    """A value is a 4-bit float times a power of two shared by 32 neighbours along the input; low nibble first."""
    name = "model.layers.0.mlp.experts.down_proj"
    original = load_file(families.random_model("gpt-oss", cache) / "model.safetensors")[name].float()
    stored = load_file(quantized.quantized_model("gpt-oss", "mxfp4", cache) / "model.safetensors")
    blocks = stored[f"{name}_blocks"]
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).to(torch.int64)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes]
    values = values * torch.exp2(stored[f"{name}_scales"].float() - 127).unsqueeze(-1)
    assert (values.flatten(-2).transpose(1, 2) - original).std() < 0.15 * original.std()


@pytest.mark.parametrize(
    ("family", "method", "router"),
    [
        ("llama", "gptq", "model.embed_tokens"),
        ("qwen3-moe", "awq", "model.layers.0.mlp.gate"),
        ("deepseek-v3", "fp8-block", "model.layers.1.mlp.gate"),
        ("gpt-oss", "mxfp4", "model.layers.0.mlp.router"),
    ],
)
def test_routers_embeddings_and_output_layers_are_not_quantized(family, method, router, cache):
    """They have their old names and bytes, and no quantized tensor is also stored unquantized."""
    before = load_file(families.random_model(family, cache) / "model.safetensors")
    tensors = load_file(quantized.quantized_model(family, method, cache) / "model.safetensors")
    kept = {name for name in before if name in tensors and before[name].dtype == tensors[name].dtype}
    assert {f"{router}.weight", "model.embed_tokens.weight", "lm_head.weight"} <= kept
    assert all(before[name].equal(tensors[name]) for name in kept)
    assert not any(quantized.METHODS[method].layers.search(name) for name in kept)
