"""Tensors over mapped memory. Each has a storage of its own, which keeps the mapping alive.

Libraries recognise tied tensors by the address and size of their storage, so the tensors of one segment must not share
a storage.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from shared_store.base.manifest import TensorEntry


class MappedMemory(Protocol):
    """Addresses with memory behind them: a :class:`~shared_store.memory.Mapping`, or a range of private memory."""

    address: int
    nbytes: int
    ordinal: int | None


def storage_of(mapping: MappedMemory) -> torch.UntypedStorage:
    """Return a storage of all bytes of a mapping, which must be mapped. Its slices keep the mapping alive too."""
    if mapping.ordinal is not None:
        device = torch.device("cuda", mapping.ordinal)
        return torch.as_tensor(_CudaBytes(mapping), device=device).untyped_storage()
    buffer: Any = (ctypes.c_ubyte * mapping.nbytes).from_address(mapping.address)
    buffer.mapping = mapping  # the storage keeps the buffer alive, the buffer the mapping
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def part_of(storage: torch.UntypedStorage, offset: int, nbytes: int) -> torch.UntypedStorage:
    """Return some bytes of a storage as another storage, which keeps the first alive."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).untyped_storage()
    part = storage[offset : offset + nbytes]
    assert isinstance(part, torch.UntypedStorage)  # noqa: S101 - a slice gives no number
    return part


def bytes_in(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return all bytes of a storage: uint8, shape ``(nbytes,)``, not copied."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


class _CudaBytes:
    """Bytes of a mapping for ``torch.as_tensor``, which keeps this object alive.

    Protocol: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3. Declared writable,
    because torch accepts nothing else; the access of the mapping is unchanged.
    """

    def __init__(self, mapping: MappedMemory) -> None:
        self.mapping = mapping
        self.__cuda_array_interface__ = {
            "data": (mapping.address, False),
            "shape": (mapping.nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def dtype_named(name: str) -> torch.dtype:
    """Return a dtype by its name in a manifest, which has been validated."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)  # noqa: S101 - see above
    return dtype


def view_of(storage: torch.UntypedStorage, entry: TensorEntry) -> torch.Tensor:
    """Return a new tensor of the manifest over the storage of its blob."""
    empty = torch.empty(0, dtype=dtype_named(entry.dtype), device=storage.device)
    return empty.set_(storage, entry.offset, entry.shape, entry.stride)


def is_plain(tensor: torch.Tensor) -> bool:
    """Return True unless the tensor wraps other tensors, or is not materialised yet."""
    return _has_plain_memory(type(tensor))


@functools.lru_cache(maxsize=256)  # models have a few types of tensors, each of them thousands of times
def _has_plain_memory(kind: type[torch.Tensor]) -> bool:
    wrapper = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not (wrapper or issubclass(kind, (nn.UninitializedParameter, nn.UninitializedBuffer)))


StorageKey: TypeAlias = tuple[torch.device, int]
"""Identifies a storage: its device and address."""


def storage_key(tensor: torch.Tensor) -> StorageKey | None:
    """Return the key of a tensor's storage; None for a tensor without plain memory."""
    if tensor.is_meta or tensor.layout is not torch.strided or not is_plain(tensor):
        return None
    address = tensor.untyped_storage().data_ptr()
    return (tensor.device, address) if address else None
