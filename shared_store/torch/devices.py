"""Work on a device that publishing needs: digests, synchronisation, and release of freed memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from shared_store.base.digest import digest_at
from shared_store.memory import Backend, backend_for

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of the C library, see ``malloc_trim(3)``; None where it is not glibc."""


class DeviceWork(Protocol):
    """Work on one device."""

    def digests(self, ranges: Sequence[torch.Tensor]) -> list[bytes]:
        """Return the BLAKE3-256 digest of each of some contiguous uint8 tensors, on their device."""

    def settle(self) -> None:
        """Wait for all work in flight; the memory that it uses may be unmapped after that."""

    def reclaim(self) -> None:
        """Return memory that this process has freed to the device."""


class HostWork:
    """Host memory. No work is in flight; the C library caches freed memory, often a large part of a model."""

    def digests(self, ranges: Sequence[torch.Tensor]) -> list[bytes]:  # noqa: D102 - the protocol's
        with ThreadPoolExecutor(4, thread_name_prefix="wooly-digest") as pool:
            return list(pool.map(lambda data: digest_at(data.data_ptr(), data.numel()), ranges))

    def settle(self) -> None:  # noqa: D102 - the protocol's
        return

    def reclaim(self) -> None:  # noqa: D102 - the protocol's
        if _malloc_trim is not None:
            _malloc_trim(0)


class CudaWork:
    """A GPU. A kernel computes digests, work is in flight on streams, and torch caches freed memory."""

    def __init__(self, device: torch.device) -> None:
        from shared_store.memory.cuda.digests import CudaDigests

        self._device = device
        self._digests = CudaDigests(torch.cuda.current_device() if device.index is None else device.index)

    def digests(self, ranges: Sequence[torch.Tensor]) -> list[bytes]:  # noqa: D102 - the protocol's
        stream = torch.cuda.current_stream(self._device).cuda_stream
        return self._digests.digest_many([(data.data_ptr(), data.numel()) for data in ranges], stream=stream)

    def settle(self) -> None:  # noqa: D102 - the protocol's
        torch.cuda.synchronize(self._device)

    def reclaim(self) -> None:  # noqa: D102 - the protocol's
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # releases unused blocks; used ones keep their addresses


def work_on(device: torch.device) -> DeviceWork:
    """Return the work of a device."""
    return CudaWork(device) if device.type == "cuda" else HostWork()


def store_device(device: torch.device) -> str:
    """Return the store's name of a torch device: ``cpu``, or the GPU's UUID."""
    if device.type != "cuda":
        return device.type
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def backend_of(device: torch.device) -> Backend:
    """Return the memory backend of a torch device. Raises :class:`UnknownDeviceError`."""
    return backend_for(store_device(device))
