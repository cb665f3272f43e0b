"""Copies between addresses of one GPU, in its primary context: the one that CuPy and torch use, too.

Relies on cuda-bindings. Does not promise that other processes see a copy before :meth:`DeviceCopies.settle`.
"""

from __future__ import annotations

from typing import Any

from shared_store.base.errors import MemoryBackendError, UnsupportedError


class DeviceCopies:
    """A hold on a GPU's primary context, current in the thread that made it."""

    def __init__(self, ordinal: int) -> None:
        """``ordinal``: CUDA's number of the GPU in this process. Raises :class:`UnsupportedError` without bindings."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise UnsupportedError("GPU memory needs cuda-bindings: pip install 'wooly[cuda13]' (or cuda12)") from error
        self._driver: Any = driver
        self._device = self._call("cuDeviceGet", ordinal)
        context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", context)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy device memory, by addresses; it may be under way when this returns."""
        self._call("cuMemcpyDtoD", target, source, nbytes)

    def settle(self) -> None:
        """Wait until all copies are made."""
        self._call("cuCtxSynchronize")

    def close(self) -> None:
        """Let go of the context."""
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._driver, name)(*arguments)
        if error:
            raise MemoryBackendError(f"{name}: {error.name}")
        return results[0] if results else None
