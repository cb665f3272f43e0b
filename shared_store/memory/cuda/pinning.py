"""Host memory that a GPU copies to and from at full speed: registered with the driver, in the primary context.

Relies on ``cuMemHostRegister``, which pins the pages (about 0.1 s a GiB) and fails where ``RLIMIT_MEMLOCK`` is lower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shared_store.memory.cuda.driver import Driver

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process


class CudaPinning:
    """Registers memory of this process with one GPU's driver."""

    def __init__(self, ordinal: int) -> None:
        """``ordinal``: the GPU's number in this process. Raises :class:`UnknownDeviceError` without a driver."""
        self._driver = Driver()
        self._ordinal = ordinal

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory, whose address and size are multiples of a page. Raises :class:`MemoryBackendError`."""
        with self._current():
            self._driver.call("cuMemHostRegister", address, nbytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        """Unpin memory that no copy uses any more. Raises :class:`MemoryBackendError`."""
        with self._current():
            self._driver.call("cuMemHostUnregister", address)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        device = self._driver.call("cuDeviceGet", self._ordinal)
        self._driver.call("cuCtxPushCurrent", self._driver.call("cuDevicePrimaryCtxRetain", device))
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent")
            self._driver.call("cuDevicePrimaryCtxRelease", device)
