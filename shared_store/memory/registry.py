"""Chooses the implementation for a device. Imports CUDA only for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shared_store.base.errors import UnknownDeviceError
from shared_store.memory.backend import Backend
from shared_store.memory.memfd import MemfdBackend
from shared_store.memory.transfer import HostTransfer, Transfer


def backend_for(device: str) -> Backend:
    """Return a backend for ``cpu``, or for a GPU by its UUID (``GPU-...``).

    Raises:
        UnknownDeviceError: this process sees no such device.
    """
    if device == "cpu":
        return MemfdBackend()
    if device.startswith("GPU-"):
        from shared_store.memory.cuda.vmm import CudaBackend  # starts the driver, which takes time

        return CudaBackend(device)
    raise UnknownDeviceError(
        f"no memory backend for device {device!r}; devices are cpu and GPUs by their UUID (GPU-...)"
    )


@contextlib.contextmanager
def transfer_for(backend: Backend) -> Iterator[Transfer]:
    """Copies of a backend's device, for a block in which the calling thread may map its memory.

    Raises:
        OutOfMemoryError: the GPU has no memory for a context.
        MemoryBackendError: the driver refuses.
    """
    transfer: Transfer
    if backend.ordinal is None:
        transfer = HostTransfer()
    else:
        from shared_store.memory.cuda.transfer import CudaTransfer

        transfer = CudaTransfer(backend.ordinal)
    try:
        with transfer.current():
            yield transfer
    finally:
        transfer.close()
