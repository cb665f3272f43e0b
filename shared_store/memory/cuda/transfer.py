"""Copies between a GPU's memory and the host's, through pinned buffers, in several threads at a time.

Relies on the driver alone (``cuda.bindings.driver``), in the device's primary context: the one that an engine's torch
has, so that in an engine nothing more is allocated on the GPU. In a process without it, the context costs VRAM (about
600 MB on an H100) until :meth:`GpuCopies.close` and the end of whatever else uses it.

Pinning memory is slow (about 0.1 s for 128 MiB), so buffers are small, and made once for each thread.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Final

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError, UnknownDeviceError

BUFFER_BYTES: Final = 4 << 20
"""Bytes of a pinned buffer, and most that one copy may have."""


class GpuCopies:
    """Copies to and from one GPU, by its number in this process."""

    def __init__(self, ordinal: int) -> None:
        """Take hold of the device's primary context. Raises :class:`UnknownDeviceError` without a driver."""
        self._driver = _start()
        self._device = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._closed = False

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """The context is the calling thread's in the block; afterwards the one before it is."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """What one thread copies with. What it began is over when the block ends well."""
        with self.current(), contextlib.ExitStack() as made:
            lane = Lane(self._call, made)
            yield lane
            lane.settle()

    def close(self) -> None:
        """Let go of the context. Idempotent; no lane may be in use."""
        if not self._closed:
            self._closed = True
            self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Make a driver call; its one result. Raises :class:`MemoryBackendError`, :class:`OutOfMemoryError`."""
        error, *results = getattr(self._driver, name)(*arguments)
        if error == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(f"{name}: no room on the GPU, or for pinned memory on the host; free some")
        if error:
            raise MemoryBackendError(f"{name}: {error.name}")
        return results[0] if results else None


class Lane:
    """One thread's stream, and two pinned buffers: one is filled while the other is copied."""

    def __init__(self, call: Callable[..., Any], made: contextlib.ExitStack) -> None:
        self._call = call
        self._stream = call("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING: not in step with the default stream
        made.callback(call, "cuStreamDestroy", self._stream)
        self._buffers: list[tuple[int, memoryview, Any]] = []
        for _ in range(2):
            address = int(call("cuMemHostAlloc", BUFFER_BYTES, 0))
            made.callback(call, "cuMemFreeHost", address)
            event = call("cuEventCreate", 3)  # CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING: waiting sleeps
            made.callback(call, "cuEventDestroy", event)
            view = memoryview((ctypes.c_char * BUFFER_BYTES).from_address(address)).cast("B")
            self._buffers.append((address, view, event))
        made.callback(call, "cuStreamSynchronize", self._stream)  # first of all: what is freed must not be in use

    def copy_in(self, address: int, nbytes: int, fill: Callable[[memoryview], None]) -> None:
        """Copy at most :data:`BUFFER_BYTES` to a device address: ``fill`` puts them into the buffer that it is given.

        The copy may still be under way on return.
        """
        host, view, event = self._next()
        self._call("cuEventSynchronize", event)  # of the copy before the last one
        fill(view[:nbytes])
        self._call("cuMemcpyHtoDAsync", address, host, nbytes, self._stream)
        self._call("cuEventRecord", event, self._stream)

    def copy_out(self, address: int, nbytes: int, take: Callable[[memoryview], None]) -> None:
        """Copy at most :data:`BUFFER_BYTES` from a device address, and give them to ``take``."""
        host, view, _ = self._next()
        self._call("cuMemcpyDtoHAsync", host, address, nbytes, self._stream)
        self.settle()
        take(view[:nbytes])

    def settle(self) -> None:
        """Wait for the copies that were begun."""
        self._call("cuStreamSynchronize", self._stream)

    def _next(self) -> tuple[int, memoryview, Any]:
        self._buffers.reverse()
        return self._buffers[0]


def _start() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnknownDeviceError("GPU memory needs cuda-bindings: pip install 'wooly[cuda13]' (or cuda12)") from error
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:  # no libcuda at all
        raise UnknownDeviceError(f"there is no NVIDIA driver: {error}") from error
    if code:
        raise UnknownDeviceError(f"the NVIDIA driver does not start: {code.name}")
    return driver
