"""Waiting until nothing uses a GPU: for the device's primary context, which torch and this package share.

Driver behaviour relied on:

* Kernels run in a context. Without one in this process, nothing of it is in flight; asking for its state makes none.
* ``cuCtxSynchronize`` waits for all work of the context, on all streams. It is illegal while a stream of the context is
  being captured, and invalidates the capture, whatever the thread and the mode of the capture. So ask first.
* ``cuStreamIsCapturing`` of the legacy default stream returns ``CUDA_ERROR_STREAM_CAPTURE_IMPLICIT`` while a blocking
  stream of the context is being captured, and does not invalidate that. It says nothing of non-blocking streams, which
  torch's are: torch's captures are recorded in :class:`shared_store.memory.unmapping.Captures`.
* An error that is not about capturing means that the context is lost, and that nothing runs in it any more.
* ``cuda-bindings`` release the interpreter lock during every call from version 12.9.1 on.

Does not wait for work in contexts that a program made for itself (``cuCtxCreate``).
"""

from __future__ import annotations

from typing import Final

from shared_store.memory.cuda.driver import Driver

_LEGACY_STREAM: Final = 1  # CU_STREAM_LEGACY
_CAPTURE_ERRORS: Final = range(900, 909)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED to ..._WRONG_THREAD


def settle(driver: Driver, ordinal: int) -> bool:
    """Wait for all work of this process on a device.

    Returns:
        True when nothing is in flight. False, at once, if a graph is being captured.
    """
    device = driver.call("cuDeviceGet", ordinal)
    _, active = driver.call("cuDevicePrimaryCtxGetState", device)
    if not active:
        return True
    driver.call("cuCtxPushCurrent", driver.call("cuDevicePrimaryCtxRetain", device))
    try:
        return not _capturing(driver) and _synchronize(driver)
    finally:
        driver.call("cuCtxPopCurrent")
        driver.call("cuDevicePrimaryCtxRelease", device)


def _capturing(driver: Driver) -> bool:
    """Return True if a blocking stream of the current context is being captured."""
    error, _ = driver.bindings.cuStreamIsCapturing(driver.bindings.CUstream(_LEGACY_STREAM))
    return int(error) in _CAPTURE_ERRORS


def _synchronize(driver: Driver) -> bool:
    """Wait for the current context. False: a capture that nobody told of was in the way, and is invalid now."""
    (error,) = driver.bindings.cuCtxSynchronize()
    return int(error) not in _CAPTURE_ERRORS
