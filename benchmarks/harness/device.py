"""Memory of a device: its backend, and how the benchmark's own process writes and reads it."""

from __future__ import annotations

import ctypes

from benchmarks.harness.gpu import first_gpu, make_context
from shared_store.memory import Backend, backend_for


class Device:
    """Host memory."""

    def __init__(self, backend: Backend | None = None) -> None:
        """Use ``backend``; by default, that of host memory."""
        self.backend = backend or backend_for("cpu")

    @property
    def name(self) -> str:
        """Name of the device: ``cpu`` or a GPU's UUID."""
        return self.backend.device

    def write(self, address: int, data: bytes) -> None:
        """Copy ``data`` to mapped memory."""
        ctypes.memmove(address, data, len(data))

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy ``nbytes`` from mapped memory."""
        return ctypes.string_at(address, nbytes)


class Gpu(Device):
    """Memory of the first visible GPU. Needs cuda-bindings, but no torch. Exits with a message if there is no GPU."""

    def __init__(self) -> None:
        super().__init__(backend_for(first_gpu()))
        make_context()

    def write(self, address: int, data: bytes) -> None:
        """Copy ``data`` to mapped memory, and wait until it is there."""
        from cuda.bindings import driver

        _check("cuMemcpyHtoD", driver.cuMemcpyHtoD(address, data, len(data)))
        _check("cuCtxSynchronize", driver.cuCtxSynchronize())

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy ``nbytes`` from mapped memory."""
        from cuda.bindings import driver

        data = bytearray(nbytes)
        _check("cuMemcpyDtoH", driver.cuMemcpyDtoH(data, address, nbytes))
        return bytes(data)


def _check(call: str, result: tuple[object]) -> None:
    from cuda.bindings import driver

    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise SystemExit(f"{call}: {result[0]}")
