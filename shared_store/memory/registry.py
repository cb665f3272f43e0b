"""Which backend serves a device."""

from __future__ import annotations

from shared_store.base.errors import UnknownDeviceError
from shared_store.memory.backend import Backend
from shared_store.memory.memfd import MemfdBackend


def backend_for(device: str) -> Backend:
    """A backend for ``cpu``, or for a GPU by its UUID (``GPU-...``).

    Raises:
        UnknownDeviceError: there is no such device here.
    """
    if device == "cpu":
        return MemfdBackend()
    if device.startswith("GPU-"):
        from shared_store.memory.cuda.vmm import CudaBackend  # starts the driver, which takes time

        return CudaBackend(device)
    raise UnknownDeviceError(
        f"no memory backend for device {device!r}; devices are cpu and GPUs by their UUID (GPU-...)"
    )
