"""Tensors over mapped memory. Each has a storage of its own, and keeps its mapping alive.

A storage of its own matters: libraries tell tied tensors by their storage's address and size, so tensors of one segment
must not look like parts of one another.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from shared_store.manifest import TensorEntry
from shared_store.memory import Mapping


def bytes_at(mapping: Mapping, offset: int, nbytes: int) -> torch.Tensor:
    """The bytes of a blob.

    Args:
        mapping: mapped memory; it lives as long as the tensor's storage does.
        offset: first byte.
        nbytes: how many.

    Returns:
        uint8, shape ``(nbytes,)``.
    """
    device = torch.device("cpu") if mapping.ordinal is None else torch.device("cuda", mapping.ordinal)
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if mapping.ordinal is not None:
        return torch.as_tensor(_CudaBytes(mapping, offset, nbytes), device=device)
    buffer: Any = (ctypes.c_ubyte * nbytes).from_address(mapping.address + offset)
    buffer.mapping = mapping  # the tensor keeps the buffer, the buffer keeps the mapping
    return torch.frombuffer(buffer, dtype=torch.uint8)


class _CudaBytes:
    """Bytes of a mapping, in the form that torch takes foreign GPU memory in; the tensor keeps this object.

    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3. Marked writable, because torch
    takes nothing else; the mapping's own rights hold.
    """

    def __init__(self, mapping: Mapping, offset: int, nbytes: int) -> None:
        self.mapping = mapping
        self.__cuda_array_interface__ = {
            "data": (mapping.address + offset, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def dtype_named(name: str) -> torch.dtype:
    """The dtype that a manifest names; the manifest was checked to name only dtypes."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)  # noqa: S101 - see above
    return dtype


def view_of(blob: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """A tensor of the manifest, over its blob's bytes (a uint8 tensor); not the same object twice."""
    empty = torch.empty(0, dtype=dtype_named(entry.dtype), device=blob.device)
    return empty.set_(blob.untyped_storage(), entry.offset, entry.shape, entry.stride)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory of its own kind: it is no wrapper around others, and no promise of a shape."""
    wrapper = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not (wrapper or isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)))


def storage_key(tensor: torch.Tensor) -> tuple[str, int] | None:
    """What two tensors have in common when they lie in one storage; None where no plain memory is behind it."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or not is_plain(tensor):
        return None
    address = tensor.untyped_storage().data_ptr()
    return (str(tensor.device), address) if address else None
