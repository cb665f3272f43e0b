"""BLAKE3-256 of device memory, computed where it lies: the digests that :mod:`shared_store.digest` gives on the CPU.

Relies on CuPy, imported when it is first needed, for NVRTC: the kernels of ``blake3.cu`` are compiled once for each
kind of GPU and kept in CuPy's cache on disk (``CUPY_CACHE_DIR``). Any number of ranges take two launches and two small
copies. Scratch memory comes from ``cudaMalloc``, not from an engine's allocator: 56 bytes for each range and 32 for
each 256 KiB of data, freed before the call returns.

Does not promise a digest of memory that is written to meanwhile.
"""

from __future__ import annotations

from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared_store.digest import SIZE
from shared_store.errors import MemoryBackendError, OutOfMemoryError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_THREADS: Final = 256
_GROUP: Final = _THREADS * 1024  # bytes: a thread hashes one chunk, a thread block the subtree over its chunks
_HOST_TO_DEVICE: Final = 1  # cudaMemcpyKind
_DEVICE_TO_HOST: Final = 2
_ERROR_MEMORY_ALLOCATION: Final = 2  # cudaError_t


class CudaDigests:
    """Digests of memory on one GPU."""

    def __init__(self, device: int | None = None) -> None:
        """``device`` is CUDA's index in this process; unset, the current device.

        Raises :class:`UnsupportedError` without CuPy and :class:`MemoryBackendError` without a usable GPU.
        """
        self._cuda = _cupy_cuda()
        with _errors(self._cuda):
            self._device = self._cuda.runtime.getDevice() if device is None else device

    def digest_many(self, ranges: Sequence[tuple[int, int]], *, stream: int = 0) -> list[bytes]:
        """The digest of each range ``(device address, bytes)``, in their order; returns when all are done.

        Addresses need no alignment, but ranges that start at a multiple of 16 bytes are faster. The work is queued on
        ``stream`` (a ``cudaStream_t``), so it sees what was queued there before. The caller vouches for the ranges:
        one that is not mapped costs the process its CUDA context, as in any kernel.

        Raises :class:`OutOfMemoryError` when the GPU has no room for the scratch memory and
        :class:`MemoryBackendError` for any other failure of CUDA.
        """
        if not ranges:
            return []
        groups = [max(1, -(-nbytes // _GROUP)) for _, nbytes in ranges]
        addresses, sizes = zip(*ranges, strict=True)
        first_groups = accumulate(groups[:-1], initial=0)
        table = array("Q", chain.from_iterable(zip(addresses, sizes, first_groups, strict=True)))
        digests = array("Q", bytes(SIZE * len(ranges)))
        with _errors(self._cuda), self._cuda.Device(self._device):
            self._run(table, groups, digests, stream)
        packed = digests.tobytes()
        return [packed[at : at + SIZE] for at in range(0, len(packed), SIZE)]

    def _run(self, table: array[int], groups: Sequence[int], digests: array[int], stream: int) -> None:
        runtime, module = self._cuda.runtime, _module()
        table_bytes, digests_bytes = len(table) * table.itemsize, len(digests) * digests.itemsize
        joined = max(groups) > 1  # a range of one group has its digest after the first kernel
        with _scratch(runtime, digests_bytes + SIZE * sum(groups) + table_bytes) as device_digests:
            device_groups = device_digests + digests_bytes
            device_table = device_groups + SIZE * sum(groups)
            runtime.memcpyAsync(device_table, table.buffer_info()[0], table_bytes, _HOST_TO_DEVICE, stream)
            with self._current(stream):
                hash_groups = module.get_function("hash_groups")
                hash_groups((sum(groups),), (_THREADS,), (device_table, len(groups), device_groups, device_digests, 1))
                if joined:
                    join_groups = module.get_function("join_groups")
                    join_groups((len(groups),), (_THREADS,), (device_table, device_groups, device_digests, 1))
            runtime.memcpyAsync(digests.buffer_info()[0], device_digests, digests_bytes, _DEVICE_TO_HOST, stream)
            runtime.streamSynchronize(stream)

    def _current(self, stream: int) -> Any:
        """A context in which CuPy launches on ``stream``."""
        if hasattr(self._cuda.Stream, "from_external"):  # from CuPy 14 on, which deprecates the other
            return self._cuda.Stream.from_external(_Stream(stream))
        return self._cuda.ExternalStream(stream)


@dataclass(frozen=True)
class _Stream:
    """A caller's stream, by CUDA's stream protocol."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle  # the protocol's version comes first


@contextmanager
def _scratch(runtime: Any, nbytes: int) -> Iterator[int]:
    address: int = runtime.malloc(nbytes)
    try:
        yield address
    finally:
        runtime.free(address)


@contextmanager
def _errors(cuda: Any) -> Iterator[None]:
    try:
        yield
    except cuda.runtime.CUDARuntimeError as error:
        if error.status == _ERROR_MEMORY_ALLOCATION:
            raise OutOfMemoryError(
                f"no room on the GPU for the scratch memory of digests ({error}); free some"
            ) from error
        raise MemoryBackendError(f"digests on the GPU failed: {error}; see `wooly doctor`") from error
    except (cuda.driver.CUDADriverError, cuda.compiler.CompileException) as error:
        raise MemoryBackendError(f"digests on the GPU failed: {error}; see `wooly doctor`") from error


def _cupy_cuda() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(
            f"digests on the GPU need CuPy ({error}); install cupy-cuda12x or cupy-cuda13x, as the driver's CUDA is"
        ) from error
    return cupy.cuda


@cache
def _module() -> Any:
    """The compiled kernels. CuPy loads them into each device's context as they are first launched there."""
    import cupy

    source = Path(__file__).with_name("blake3.cu").read_text(encoding="utf-8")
    return cupy.RawModule(code=source, options=("--std=c++17", f"-DTHREADS={_THREADS}"))
