"""vLLM's linear layers on a CPU, with weights that can be shared.

After loading, vLLM packs the weight of each linear layer: a small one into a tensor that only a closure refers to, a
large one into a oneDNN handle in private memory. Other processes can map neither. With this module, small weights use
the same kernel, with the packed tensor as an attribute of the layer, and large ones stay plain, for
``torch.nn.functional.linear``. Results are bitwise equal to stock vLLM's where the kernel is the same, and elsewhere to
those of stock vLLM with ``WOOLY_CPU_DISPATCH=1``, which uses this module with every load format. Before vLLM 0.29 all
weights stay plain, because the kernel for small ones took other arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from wooly_vllm import compat

PACKED = "wooly_packed"
"""Attribute of a layer: its packed weight (tensor)."""
ROWS = "wooly_packed_rows"
"""Attribute of a layer: number of rows of the weight before it was packed."""

_MODULE = "vllm.model_executor.layers.utils"
_NAME = "dispatch_cpu_unquantized_gemm"
_bound: ContextVar[bool] = ContextVar("wooly_bound", default=False)


@contextlib.contextmanager
def shareable(device: torch.device, *, bound: bool) -> Iterator[None]:
    """Make vLLM prepare linear layers for sharing in this context.

    Args:
        device: the engine's; nothing is done unless it is a CPU.
        bound: the layers have their final tensors, and only select a kernel.
    """
    if device.type != "cpu":
        yield
        return
    token = _bound.set(bound)
    uninstall = install()
    try:
        yield
    finally:
        uninstall()
        _bound.reset(token)


def install() -> Callable[[], None]:
    """Replace vLLM's dispatch by this module's; return a function that restores it."""
    import importlib

    (stock,) = compat.find(_MODULE, _NAME)
    if getattr(stock, "wooly_stock", None) is not None:
        return lambda: None
    module = importlib.import_module(_MODULE)

    def dispatch(layer: nn.Module, remove_weight: bool) -> None:
        _prepare(layer, remove_weight=remove_weight, stock=stock)

    dispatch.wooly_stock = stock  # type: ignore[attr-defined]
    setattr(module, _NAME, dispatch)
    return lambda: setattr(module, _NAME, stock)


def _prepare(layer: Any, *, remove_weight: bool, stock: Callable[..., None]) -> None:
    if _bound.get():
        if getattr(layer, PACKED, None) is not None:
            layer.cpu_linear = _packed_linear(layer)
        elif layer.weight.ndim == 2:
            layer.cpu_linear = nn.functional.linear
        return
    if layer.weight.is_meta or layer.weight.ndim != 2:
        stock(layer, remove_weight)
        return
    (small_enough,) = compat.find(_MODULE, "check_cpu_sgl_kernel")
    rows, columns = layer.weight.shape
    if not compat.packs_small_weights() or not small_enough(rows, columns, layer.weight.dtype):
        layer.cpu_linear = nn.functional.linear
        return
    setattr(layer, PACKED, torch.ops._C.convert_weight_packed(layer.weight))
    setattr(layer, ROWS, rows)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = layer.bias.to(torch.float32)  # the kernel requires float32
    if remove_weight:
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
    layer.cpu_linear = _packed_linear(layer)


def _packed_linear(layer: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    (multiply,) = compat.find("vllm._custom_ops", "weight_packed_linear_cpu")
    rows = getattr(layer, ROWS)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - vLLM passes the emptied weight
        result: torch.Tensor = multiply(x, getattr(layer, PACKED), rows, bias)
        return result

    return linear
