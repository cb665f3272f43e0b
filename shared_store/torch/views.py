"""Tensors over mapped memory. Each has a storage of its own, and keeps its mapping alive.

A storage of its own matters: libraries tell tied tensors by their storage's address and size, so tensors of one segment
must not look like parts of one another.
"""

from __future__ import annotations

import ctypes
from typing import Any, TypeAlias

import torch
from torch import nn

from shared_store.base.manifest import TensorEntry
from shared_store.memory import Mapping


def storage_of(mapping: Mapping) -> torch.UntypedStorage:
    """All bytes of a mapping, which must be mapped. The mapping lives as long as the storage, or a slice of it."""
    if mapping.ordinal is not None:
        device = torch.device("cuda", mapping.ordinal)
        return torch.as_tensor(_CudaBytes(mapping), device=device).untyped_storage()
    buffer: Any = (ctypes.c_ubyte * mapping.nbytes).from_address(mapping.address)
    buffer.mapping = mapping  # the storage keeps the buffer, the buffer keeps the mapping
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def part_of(storage: torch.UntypedStorage, offset: int, nbytes: int) -> torch.UntypedStorage:
    """Some bytes of a storage, as a storage of its own that keeps the other alive."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).untyped_storage()
    part = storage[offset : offset + nbytes]
    assert isinstance(part, torch.UntypedStorage)  # noqa: S101 - a slice gives no number
    return part


def bytes_in(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage, as uint8, shape ``(nbytes,)``."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


class _CudaBytes:
    """Bytes of a mapping, in the form that torch takes foreign GPU memory in; the tensor keeps this object.

    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3. Marked writable, because torch
    takes nothing else; the mapping's own rights hold.
    """

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.__cuda_array_interface__ = {
            "data": (mapping.address, False),
            "shape": (mapping.nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def dtype_named(name: str) -> torch.dtype:
    """The dtype that a manifest names; the manifest was checked to name only dtypes."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)  # noqa: S101 - see above
    return dtype


def view_of(storage: torch.UntypedStorage, entry: TensorEntry) -> torch.Tensor:
    """A tensor of the manifest, over its blob's bytes; not the same object twice."""
    empty = torch.empty(0, dtype=dtype_named(entry.dtype), device=storage.device)
    return empty.set_(storage, entry.offset, entry.shape, entry.stride)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory of its own kind: it is no wrapper around others, and no promise of a shape."""
    wrapper = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not (wrapper or isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)))


StorageKey: TypeAlias = tuple[torch.device, int]
"""What two tensors have in common when they lie in one storage: the device and the address."""


def storage_key(tensor: torch.Tensor) -> StorageKey | None:
    """The key of the storage that a tensor lies in; None where no plain memory is behind it."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or not is_plain(tensor):
        return None
    address = tensor.untyped_storage().data_ptr()
    return (tensor.device, address) if address else None
