"""BLAKE3-256 of device memory, computed on the device: equal to the digests of :mod:`shared_store.base.digest`.

Relies on CuPy, imported on first use, for NVRTC: the kernels of ``blake3.cu`` are compiled once for each kind of GPU
and cached by CuPy on disk (``CUPY_CACHE_DIR``). Any number of ranges take two launches and two small copies.

Scratch memory comes from ``cudaMalloc``, not from an engine's allocator: 56 bytes for each range, and 32 for each
256 KiB of data. The host needs 56 bytes of pinned memory for each range. Later calls reuse both, and they are freed
with the object, because allocating takes longer than hashing a small tensor.

Does not promise a digest of memory that is written to at the same time.
"""

from __future__ import annotations

from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shared_store.base.digest import SIZE
from shared_store.base.errors import MemoryBackendError, OutOfMemoryError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_THREADS: Final = 256
_GROUP: Final = _THREADS * 1024  # bytes; a thread hashes one chunk, a thread block the subtree over its chunks
_HOST_TO_DEVICE: Final = 1  # cudaMemcpyKind
_DEVICE_TO_HOST: Final = 2
_ERROR_MEMORY_ALLOCATION: Final = 2  # cudaError_t


class CudaDigests:
    """Digests of memory on one GPU. Thread-safe: calls run one after another."""

    def __init__(self, device: int | None = None) -> None:
        """Digests on a device by its number in this process; by default the current device.

        Raises:
            UnsupportedError: CuPy is not installed.
            MemoryBackendError: there is no usable GPU.
        """
        self._cuda = _cupy_cuda()
        self._lock = Lock()
        self._scratch = _Scratch(self._cuda)
        with _errors(self._cuda):
            self._device = self._cuda.runtime.getDevice() if device is None else device

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
        with self._lock, _errors(self._cuda), self._cuda.Device(self._device):
            packed = self._run(table.tobytes(), groups, stream)
        return [packed[at : at + SIZE] for at in range(0, len(packed), SIZE)]

    def _run(self, table: bytes, groups: Sequence[int], stream: int) -> bytes:
        runtime, kernels, count = self._cuda.runtime, _kernels(self._device), len(groups)
        # Layout on the device: digests, a chaining value for each group, the table. On the host: table, digests.
        host, device = self._scratch.at_least(len(table) + SIZE * count, len(table) + SIZE * (count + sum(groups)))
        device_groups = device + SIZE * count
        device_table = device_groups + SIZE * sum(groups)
        content = memoryview(host).cast("B")
        content[: len(table)] = table
        runtime.memcpyAsync(device_table, host.ptr, len(table), _HOST_TO_DEVICE, stream)
        with self._current(stream):
            kernels.hash_groups((sum(groups),), (_THREADS,), (device_table, count, device_groups, device, 1))
            if max(groups) > 1:  # the first kernel finishes ranges of one group
                kernels.join_groups((count,), (_THREADS,), (device_table, device_groups, device, 1))
        runtime.memcpyAsync(host.ptr + len(table), device, SIZE * count, _DEVICE_TO_HOST, stream)
        runtime.streamSynchronize(stream)
        return bytes(content[len(table) : len(table) + SIZE * count])

    def _current(self, stream: int) -> Any:
        """Return a context in which CuPy launches on ``stream``."""
        if hasattr(self._cuda.Stream, "from_external"):  # CuPy 14 and later, which deprecate ExternalStream
            return self._cuda.Stream.from_external(_Stream(stream))
        return self._cuda.ExternalStream(stream)


@dataclass(frozen=True)
class _Stream:
    """A stream of the caller, in CUDA's stream protocol."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle  # version of the protocol, stream


class _Scratch:
    """Memory on the device and pinned memory on the host, reused by later calls and replaced when too small."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._host: Any = None
        self._device: Any = None

    def at_least(self, host_bytes: int, device_bytes: int) -> tuple[Any, int]:
        """Return pinned memory (as CuPy's pointer) and an address on the current device, of at least these sizes."""
        if self._host is None or self._host.mem.size < host_bytes:
            self._host = self._cuda.PinnedMemoryPointer(self._cuda.PinnedMemory(host_bytes), 0)
        if self._device is None or self._device.size < device_bytes:
            self._device = None  # free it before allocating more
            self._device = self._cuda.Memory(device_bytes)
        return self._host, self._device.ptr


@contextmanager
def _errors(cuda: Any) -> Iterator[None]:
    try:
        yield
    except cuda.runtime.CUDARuntimeError as error:
        if error.status == _ERROR_MEMORY_ALLOCATION:
            raise OutOfMemoryError(
                f"out of GPU memory for the scratch memory of digests ({error}); free some"
            ) from error
        raise MemoryBackendError(f"digests on the GPU failed: {error}; see `wooly doctor`") from error
    except (cuda.driver.CUDADriverError, cuda.compiler.CompileException) as error:
        raise MemoryBackendError(f"digests on the GPU failed: {error}; see `wooly doctor`") from error


def _cupy_cuda() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(
            f"digests on a GPU need CuPy ({error}): install cupy-cuda12x or cupy-cuda13x, to match the driver"
        ) from error
    return cupy.cuda


class _Kernels(NamedTuple):
    """The compiled kernels, loaded into the context of one device."""

    hash_groups: Any
    join_groups: Any


@cache
def _kernels(device: int) -> _Kernels:  # noqa: ARG001 - the cache key; it is the current device
    import cupy

    source = Path(__file__).with_name("blake3.cu").read_text(encoding="utf-8")
    module = cupy.RawModule(code=source, options=("--std=c++17", f"-DTHREADS={_THREADS}"))
    return _Kernels(module.get_function("hash_groups"), module.get_function("join_groups"))
