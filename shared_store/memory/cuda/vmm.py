"""Segments in a GPU's memory: physical allocations of CUDA's virtual memory management, handed on as fds.

Driver behaviour this relies on (measured on an H100, driver 580, CUDA 13.0):

* ``cuMemCreate`` and ``cuMemExportToShareableHandle`` need no context, so the store costs 4 MiB of VRAM and not 600.
* The exported fd stands for the memory in any process, any namespace; memory lives while a mapping, a handle or a plain
  fd does. An *imported* handle cannot be exported again, so an importer keeps a dup of the fd it was given.
* ``CU_MEM_ACCESS_FLAGS_PROT_READ`` is enforced by the GPU's MMU. A kernel that writes gets an illegal-address error and
  its process loses its context; other processes go on. Whoever holds the fd could map it for writing if it wanted to:
  this protects against accidents.
* Memory can be unmapped and mapped again at a reserved address; captured CUDA graphs stay valid.

Does not promise: that bytes are zeroed, or that sealing stops a hostile process.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError, UnknownDeviceError
from shared_store.memory.backend import Access, Backend, Segment
from shared_store.runtime.fds import OwnedFd, duplicate

_MEGA = 1 << 20


class CudaSegment(Segment):
    """A physical allocation. ``fd``: what it was imported from; None where this process made it."""

    def __init__(self, handle: Any, nbytes: int, fd: OwnedFd | None) -> None:
        super().__init__(nbytes)
        self.handle = handle
        self.fd = fd


class CudaBackend(Backend):
    """The memory of one GPU."""

    host_readable = False

    def __init__(self, device: str) -> None:
        """Find a GPU by its UUID (``GPU-...``), among those that ``CUDA_VISIBLE_DEVICES`` shows.

        Raises:
            UnknownDeviceError: there is none, or no driver.
        """
        visible = visible_gpus()
        if device not in visible:
            raise UnknownDeviceError(
                f"no GPU {device} is visible to this process; it sees: {', '.join(visible) or 'none'}"
            )
        self.device = device
        self.ordinal = self._number = visible[device]
        driver = _driver()
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.requestedHandleTypes = _fd_type(driver)
        self._properties.location = _location(driver, self._number)
        recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(_check("cuMemGetAllocationGranularity", self._properties, recommended))

    def create(self, nbytes: int) -> CudaSegment:  # noqa: D102 - the interface's
        error, handle = _driver().cuMemCreate(nbytes, self._properties, 0)
        if error == _driver().CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(
                f"no room for a segment of {nbytes} bytes on {self.device}: {self.free_bytes()} bytes are free, "
                f"{holders(_nvidia_smi('--query-compute-apps=pid,used_memory', self.device))}; "
                "stop one of its users"
            )
        _raise("cuMemCreate", error)
        return CudaSegment(handle, nbytes, None)

    def export(self, segment: Segment) -> OwnedFd:  # noqa: D102 - the interface's
        held = self._own(segment)
        if held.fd is not None:
            return held.fd.dup()
        fd = OwnedFd(int(_check("cuMemExportToShareableHandle", held.handle, _fd_type(_driver()), 0)))
        os.set_inheritable(fd.fileno(), False)
        return fd

    def import_fd(self, fd: int, nbytes: int) -> CudaSegment:  # noqa: D102 - the interface's
        try:
            kept = duplicate(fd)
        except OSError as error:
            raise MemoryBackendError(f"fd {fd} is not a segment in GPU memory: {error.strerror}") from error
        try:
            handle = _check("cuMemImportFromShareableHandle", kept.fileno(), _fd_type(_driver()))
        except MemoryBackendError as error:
            kept.close()
            raise MemoryBackendError(f"fd {fd} is not a segment in GPU memory: {error}") from error
        return CudaSegment(handle, nbytes, kept)

    def seal(self, segment: Segment) -> None:
        """Nothing: a GPU has no seals. Readers map read-only, and the publisher digests what it published."""

    def sealed(self, segment: Segment) -> bool:  # noqa: ARG002 - the interface's
        """Always: there is nothing that could be missing."""
        return True

    def reserve(self, nbytes: int) -> int:  # noqa: D102 - the interface's
        return int(_check("cuMemAddressReserve", nbytes, 0, 0, 0))

    def unreserve(self, address: int, nbytes: int) -> None:  # noqa: D102 - the interface's
        _check("cuMemAddressFree", address, nbytes)

    def map(self, segment: Segment, address: int, access: Access) -> None:  # noqa: D102 - the interface's
        driver = _driver()
        _check("cuMemMap", address, segment.nbytes, 0, self._own(segment).handle, 0)
        rights = driver.CUmemAccessDesc()
        rights.location = _location(driver, self._number)
        flags = driver.CUmemAccess_flags
        writable = access is Access.WRITE
        rights.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        try:
            _check("cuMemSetAccess", address, segment.nbytes, [rights], 1)
        except MemoryBackendError:
            _check("cuMemUnmap", address, segment.nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap; no kernel may still use the range, so the caller synchronises first."""
        _check("cuMemUnmap", address, nbytes)

    def release(self, segment: Segment) -> None:  # noqa: D102 - the interface's
        held = self._own(segment)
        if held.released:
            return
        held.released = True
        _check("cuMemRelease", held.handle)
        if held.fd is not None:
            held.fd.close()

    def private_bytes(self, address: int, nbytes: int) -> int:  # noqa: ARG002 - the interface's
        """Zero: a write to read-only GPU memory never makes a copy."""
        return 0

    def free_bytes(self) -> int:
        """What the driver says is free. It asks ``nvidia-smi``, because asking CUDA would need a context."""
        return int(_nvidia_smi("--query-gpu=memory.free", self.device) or 0) * _MEGA

    @staticmethod
    def _own(segment: Segment) -> CudaSegment:
        assert isinstance(segment, CudaSegment)  # noqa: S101 - segments go back to the backend they came from
        return segment


def visible_gpus() -> dict[str, int]:
    """UUID to ordinal of every GPU that this process sees; empty without a driver or without ``cuda-bindings``."""
    try:
        driver = _driver()
    except UnknownDeviceError:
        return {}
    error, count = driver.cuDeviceGetCount()
    if error:
        return {}
    found: dict[str, int] = {}
    for ordinal in range(count):
        raw = bytes(_check("cuDeviceGetUuid", _check("cuDeviceGet", ordinal)).bytes).hex()
        found["GPU-" + "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))] = ordinal
    return found


def holders(rows: str) -> str:
    """Who holds how much of a GPU, as text for an error; from lines of ``pid, MiB`` as ``nvidia-smi`` writes them."""
    users = [[part.strip() for part in row.split(",")] for row in rows.splitlines()]
    if not users:
        return "and nvidia-smi names no process that uses it (in a container it may not see them: ask it on the host)"
    told = (f"pid {pid} ({used} MiB)" if used.isdigit() else f"pid {pid} (not told how much)" for pid, used in users)
    return f"the rest is used by {', '.join(told)}"


def _nvidia_smi(query: str, device: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", device]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # only texts of errors depend on it


def _driver() -> Any:
    """``cuda.bindings.driver``, initialised. Raises :class:`UnknownDeviceError` where there is none."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnknownDeviceError("GPU memory needs cuda-bindings: pip install 'wooly[cuda13]' (or cuda12)") from error
    try:
        (error_code,) = driver.cuInit(0)
    except RuntimeError as error:  # no libcuda at all
        raise UnknownDeviceError(f"there is no NVIDIA driver: {error}") from error
    if error_code:
        raise UnknownDeviceError(f"the NVIDIA driver does not start: {error_code.name}")
    return driver


def _fd_type(driver: Any) -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _location(driver: Any, ordinal: int) -> Any:
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = ordinal
    return location


def _check(call: str, *arguments: Any) -> Any:
    """Make a driver call; its one result, or :class:`MemoryBackendError`."""
    error, *results = getattr(_driver(), call)(*arguments)
    _raise(call, error)
    return results[0] if results else None


def _raise(call: str, error: Any) -> None:
    if error:
        raise MemoryBackendError(f"{call}: {error.name}")
