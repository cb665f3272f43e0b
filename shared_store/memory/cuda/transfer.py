"""Copies of a GPU's memory: within it, and to and from the host through pinned buffers, from several threads.

Relies on the driver alone, in the device's primary context: the one that an engine's torch uses, so that in an engine
nothing more is allocated on the GPU. In a process without one, the context costs VRAM (620 to 640 MiB on an H100) until
:meth:`CudaTransfer.close` and until nothing else uses it.

Driver behaviour relied on:

* ``cuDevicePrimaryCtxRetain`` counts its users, and ``cuDevicePrimaryCtxRelease`` the opposite. torch retains
  the same context for itself.
* ``cuCtxPushCurrent`` makes a context the calling thread's, and ``cuCtxPopCurrent`` restores the one before it.
* ``cuMemcpyDtoD`` runs on the default stream and may return before it has finished. ``cuCtxSynchronize`` waits for it.
  Other processes see the bytes after that, not before.
* An event that was never recorded counts as complete.
* Pinning is slow (about 0.1 s for 128 MiB), so buffers are small, and made once for each thread.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from shared_store.memory.cuda.driver import Driver
from shared_store.memory.transfer import BUFFER_BYTES, Lane, Transfer

_STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the default stream
_EVENT_FLAGS = 3  # CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING: waiting sleeps instead of spinning


class CudaTransfer(Transfer):
    """Copies of one GPU's memory, by its number in this process."""

    def __init__(self, ordinal: int) -> None:
        """Retain the device's primary context.

        Raises:
            UnknownDeviceError: there is no driver.
            OutOfMemoryError: the GPU has no memory for a context.
            MemoryBackendError: the driver refuses.
        """
        self._driver = Driver()
        self._device = self._driver.call("cuDeviceGet", ordinal)
        self._context = self._driver.call("cuDevicePrimaryCtxRetain", self._device)
        self._closed = False

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context the calling thread's within the block, and restore the previous one afterwards."""
        self._driver.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent")

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """Open a stream with two pinned buffers, for the calling thread. Waits for its copies if the block succeeds."""
        with self.current(), contextlib.ExitStack() as made:
            lane = _CudaLane(self._driver.call, made)
            yield lane
            lane.settle()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device. The copy may still be in flight on return."""
        self._driver.call("cuMemcpyDtoD", target, source, nbytes)

    def settle(self) -> None:
        """Wait for all work in the context: copies of any lane, and kernels of torch."""
        self._driver.call("cuCtxSynchronize")

    def close(self) -> None:
        """Release the context. Idempotent. No lane may be open."""
        if not self._closed:
            self._closed = True
            self._driver.call("cuDevicePrimaryCtxRelease", self._device)


class _CudaLane(Lane):
    """A stream and two pinned buffers: one is filled while the other is copied."""

    def __init__(self, call: Callable[..., Any], made: contextlib.ExitStack) -> None:
        """``made`` frees the stream, buffers and events, in reverse order."""
        self._call = call
        self._stream = call("cuStreamCreate", _STREAM_NON_BLOCKING)
        made.callback(call, "cuStreamDestroy", self._stream)
        self._buffers: list[tuple[int, memoryview, Any]] = []
        for _ in range(2):
            address = int(call("cuMemHostAlloc", BUFFER_BYTES, 0))
            made.callback(call, "cuMemFreeHost", address)
            event = call("cuEventCreate", _EVENT_FLAGS)
            made.callback(call, "cuEventDestroy", event)
            view = memoryview((ctypes.c_char * BUFFER_BYTES).from_address(address)).cast("B")
            self._buffers.append((address, view, event))
        made.callback(call, "cuStreamSynchronize", self._stream)  # runs first: nothing is freed while in use

    def copy_in(self, address: int, nbytes: int, fill: Callable[[memoryview], None]) -> None:
        host, view, event = self._next()
        self._call("cuEventSynchronize", event)  # of this buffer's previous copy
        fill(view[:nbytes])
        self._call("cuMemcpyHtoDAsync", address, host, nbytes, self._stream)
        self._call("cuEventRecord", event, self._stream)

    def copy_out(self, address: int, nbytes: int, take: Callable[[memoryview], None]) -> None:
        host, view, _ = self._next()
        self._call("cuMemcpyDtoHAsync", host, address, nbytes, self._stream)
        self.settle()
        take(view[:nbytes])

    def settle(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def _next(self) -> tuple[int, memoryview, Any]:
        self._buffers.reverse()
        return self._buffers[0]
