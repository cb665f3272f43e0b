"""BLAKE3-256 of device memory, computed on the device: equal to the digests of :mod:`shared_store.base.digest`.

Relies on the driver alone, in the device's primary context, and on kernels that are compiled ahead (see
:mod:`shared_store.memory.cuda.kernels`). Any number of ranges take two launches and two small copies.

Scratch memory comes from ``cuMemAlloc``, not from an engine's allocator: 56 bytes for each range, and 32 for each
256 KiB of data. The host needs 56 bytes of pinned memory for each range. Later calls reuse both, and they are freed
with the object, because allocating takes longer than hashing a small tensor.

Does not promise a digest of memory that is written to at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from threading import Lock
from typing import Any, Final

from shared_store.base.digest import SIZE
from shared_store.base.errors import MemoryBackendError, OutOfMemoryError
from shared_store.memory.cuda.driver import Driver
from shared_store.memory.cuda.images import THREADS
from shared_store.memory.cuda.kernels import kernels_of

_GROUP: Final = THREADS * 1024  # bytes; a thread hashes one chunk, a thread block the subtree over its chunks


class CudaDigests:
    """Digests of memory on one GPU. Thread-safe: calls run one after another."""

    def __init__(self, device: int = 0) -> None:
        """Digests on a device, by its number in this process. Loads the kernels.

        Raises:
            UnknownDeviceError: there is no driver, or no ``cuda-bindings``.
            OutOfMemoryError: the GPU has no memory for a context.
            MemoryBackendError: there is no such GPU, or the driver refuses.
        """
        self._driver = Driver()
        self._lock = Lock()
        with _errors():
            self._kernels = kernels_of(self._driver, device)
        self._scratch = _Scratch(self._driver)

    def digest_many(self, ranges: Sequence[tuple[int, int]], *, stream: int = 0) -> list[bytes]:
        """Digest device memory and wait for the result.

        Args:
            ranges: ``(device address, bytes)`` of each. Addresses need no alignment, but ranges at multiples of 16
                bytes are faster. A range that is not mapped costs the process its CUDA context, as in any kernel.
            stream: a ``cudaStream_t`` that the work is queued on, after all work queued there before.

        Returns:
            A digest of 32 bytes for each range, in their order.

        Raises:
            OutOfMemoryError: the GPU has no memory for the scratch memory.
            MemoryBackendError: CUDA failed otherwise.
        """
        if not ranges:
            return []
        groups = [max(1, -(-nbytes // _GROUP)) for _, nbytes in ranges]
        first_groups = accumulate(groups[:-1], initial=0)
        table = array(
            "Q", chain.from_iterable((*span, first) for span, first in zip(ranges, first_groups, strict=True))
        )
        with self._lock, _errors(), self._current():
            packed = self._run(table.tobytes(), groups, stream)
        return [packed[at : at + SIZE] for at in range(0, len(packed), SIZE)]

    def _run(self, table: bytes, groups: Sequence[int], stream: int) -> bytes:
        call, count = self._driver.call, len(groups)
        # Layout on the device: digests, a chaining value for each group, the table. On the host: table, digests.
        host, device = self._scratch.at_least(len(table) + SIZE * count, len(table) + SIZE * (count + sum(groups)))
        device_groups = device + SIZE * count
        device_table = device_groups + SIZE * sum(groups)
        ctypes.memmove(host, table, len(table))
        call("cuMemcpyHtoDAsync", device_table, host, len(table), stream)
        self._launch(self._kernels.hash_groups, sum(groups), stream, device_table, count, device_groups, device, 1)
        if max(groups) > 1:  # the first kernel finishes ranges of one group
            self._launch(self._kernels.join_groups, count, stream, device_table, device_groups, device, 1)
        call("cuMemcpyDtoHAsync", host + len(table), device, SIZE * count, stream)
        call("cuStreamSynchronize", stream)
        return ctypes.string_at(host + len(table), SIZE * count)

    def _launch(self, kernel: Any, blocks: int, stream: int, *arguments: int) -> None:
        """Queue a kernel whose arguments are all 64 bits wide: addresses and numbers."""
        values = (ctypes.c_uint64 * len(arguments))(*arguments)
        width, start = ctypes.sizeof(ctypes.c_uint64), ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(arguments))(*(start + width * at for at in range(len(arguments))))
        self._driver.call(
            "cuLaunchKernel",
            *(kernel, blocks, 1, 1, THREADS, 1, 1),
            *(0, stream, ctypes.addressof(pointers), 0),  # shared memory, stream, arguments (copied now), options
        )

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device's context the calling thread's within the block."""
        self._driver.call("cuCtxPushCurrent", self._kernels.context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent")

    def __del__(self) -> None:
        if hasattr(self, "_scratch") and not sys.is_finalizing():  # the end of the process frees everything
            with contextlib.suppress(MemoryBackendError, OutOfMemoryError), self._current():  # a lost context has none
                self._scratch.free()


class _Scratch:
    """Memory on the device and pinned memory on the host, reused by later calls and replaced when too small."""

    def __init__(self, driver: Driver) -> None:
        self._call = driver.call
        self._host = self._host_bytes = 0
        self._device = self._device_bytes = 0

    def at_least(self, host_bytes: int, device_bytes: int) -> tuple[int, int]:
        """Return the addresses of pinned memory, and of memory of the current context, of at least these sizes."""
        if self._host_bytes < host_bytes:
            self._free_host()
            self._host, self._host_bytes = int(self._call("cuMemHostAlloc", host_bytes, 0)), host_bytes
        if self._device_bytes < device_bytes:
            self._free_device()
            self._device, self._device_bytes = int(self._call("cuMemAlloc", device_bytes)), device_bytes
        return self._host, self._device

    def free(self) -> None:
        """Free both, in the context that they were allocated in."""
        self._free_host()
        self._free_device()

    def _free_host(self) -> None:
        if self._host_bytes:
            self._host_bytes = 0
            self._call("cuMemFreeHost", self._host)

    def _free_device(self) -> None:
        if self._device_bytes:
            self._device_bytes = 0
            self._call("cuMemFree", self._device)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"out of GPU memory for the scratch memory of digests ({error}); free some") from error
    except MemoryBackendError as error:
        raise MemoryBackendError(f"digests on the GPU failed: {error}; see `wooly doctor`") from error
