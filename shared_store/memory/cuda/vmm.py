"""Segments in a GPU's memory: allocations of CUDA's virtual memory management, passed on as descriptors.

Driver behaviour relied on (measured on an H100, driver 580, CUDA 13.0):

* ``cuMemCreate`` and ``cuMemExportToShareableHandle`` need no context. A store that calls nothing else uses 4 MiB of
  VRAM instead of more than 600.
* An exported descriptor is valid in any process and any namespace. The memory lives as long as a mapping, a handle or a
  plain descriptor of it does.
* An *imported* handle cannot be exported (``CUDA_ERROR_INVALID_VALUE``), so an importer keeps a duplicate of the
  descriptor that it imported.
* ``CU_MEM_ACCESS_FLAGS_PROT_READ`` is enforced by the GPU's MMU. A kernel that writes gets an illegal-address error and
  its process loses its context; other processes go on. (Under MPS it ends other clients too.) A process that has the
  descriptor can map it for writing: this protects against accidents, not against a hostile process.
* Memory can be unmapped and mapped again at a reserved address, and captured CUDA graphs stay valid.
* ``cuMemUnmap`` does not synchronize. A kernel that still reads the range faults, and its process loses its context:
  :mod:`shared_store.memory.unmapping` waits first.
* A range is unmapped before ``cuMemMap`` maps it again, and ``cuMemSetAccess`` follows before any access.
* Few, large segments: importing and mapping 16 GiB takes 1.2 ms as one segment, 690 ms as 8,192 of 2 MiB.

Does not promise that bytes are zeroed, or that sealing stops a hostile process.
"""

from __future__ import annotations

import os
from typing import Any

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError, UnknownDeviceError
from shared_store.memory.backend import Access, Backend, Segment, Unknown
from shared_store.memory.cuda import context, nvml
from shared_store.memory.cuda.driver import Driver, visible_gpus
from shared_store.memory.descriptors import duplicate
from shared_store.runtime import fds
from shared_store.runtime.fds import OwnedFd


class CudaSegment(Segment):
    """A physical allocation. ``fd``: the descriptor that it was imported from; None if this process created it."""

    def __init__(self, handle: Any, nbytes: int, fd: OwnedFd | None) -> None:
        super().__init__(nbytes)
        self.handle = handle
        self.fd = fd


class CudaBackend(Backend):
    """The memory of one GPU."""

    host_readable = False
    asynchronous = True
    zeroed = False

    def __init__(self, device: str) -> None:
        """Find a GPU by its UUID (``GPU-...``), among those that ``CUDA_VISIBLE_DEVICES`` shows.

        Raises:
            UnknownDeviceError: there is no such GPU, or no driver.
        """
        visible = visible_gpus()
        if device not in visible:
            raise UnknownDeviceError(
                f"no GPU {device} is visible to this process; it sees: {', '.join(visible) or 'none'}"
            )
        self.device = device
        self.ordinal = self._number = visible[device]
        self._driver = Driver()
        types = self._driver.bindings
        self._fd_type = types.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = self._allocation(self._fd_type)
        self._private_properties = self._allocation(types.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE)
        recommended = types.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(self._driver.call("cuMemGetAllocationGranularity", self._properties, recommended))

    def create(self, nbytes: int) -> CudaSegment:  # noqa: D102 - documented by the interface
        return self._create(nbytes, self._properties)

    def create_private(self, nbytes: int) -> CudaSegment:
        """Allocate memory without a handle type: the driver's checkpoint saves it, and not what can be exported."""
        return self._create(nbytes, self._private_properties)

    def _create(self, nbytes: int, properties: Any) -> CudaSegment:
        try:
            handle = self._driver.call("cuMemCreate", nbytes, properties, 0)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"cannot allocate a segment of {nbytes} bytes on {self.device}: {self.free_bytes()} bytes are free, "
                f"{nvml.usage(self.device)}; stop a process that uses this GPU"
            ) from error
        return CudaSegment(handle, nbytes, None)

    def export(self, segment: Segment) -> OwnedFd:  # noqa: D102 - documented by the interface
        own = self._own(segment)
        if own.fd is not None:
            return duplicate(own.fd.fileno())
        fd = OwnedFd(int(self._driver.call("cuMemExportToShareableHandle", own.handle, self._fd_type, 0)))
        os.set_inheritable(fd.fileno(), False)
        return fd

    def import_fd(self, fd: int, nbytes: int) -> CudaSegment:  # noqa: D102 - documented by the interface
        try:
            own_fd = fds.duplicate(fd)
        except OSError as error:
            raise MemoryBackendError(f"descriptor {fd} is not a segment in GPU memory: {error.strerror}") from error
        try:
            handle = self._driver.call("cuMemImportFromShareableHandle", own_fd.fileno(), self._fd_type)
        except (MemoryBackendError, OutOfMemoryError) as error:
            own_fd.close()
            raise MemoryBackendError(f"descriptor {fd} is not a segment in GPU memory: {error}") from error
        return CudaSegment(handle, nbytes, own_fd)

    def seal(self, segment: Segment) -> None:
        """Do nothing: a GPU has no seals. Readers map read-only, and the publisher digests the published bytes."""

    def sealed(self, segment: Segment) -> bool:  # noqa: ARG002 - the interface's
        """Return True: there is nothing to do."""
        return True

    def reserve(self, nbytes: int) -> int:  # noqa: D102 - documented by the interface
        return int(self._driver.call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def unreserve(self, address: int, nbytes: int) -> None:  # noqa: D102 - documented by the interface
        self._driver.call("cuMemAddressFree", address, nbytes)

    def map(self, segment: Segment, address: int, access: Access) -> None:  # noqa: D102 - documented by the interface
        types = self._driver.bindings
        self._driver.call("cuMemMap", address, segment.nbytes, 0, self._own(segment).handle, 0)
        rights = types.CUmemAccessDesc()
        rights.location = self._location()
        flags = types.CUmemAccess_flags
        writable = access is Access.WRITE
        rights.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        try:
            self._driver.call("cuMemSetAccess", address, segment.nbytes, [rights], 1)
        except (MemoryBackendError, OutOfMemoryError):
            self._driver.call("cuMemUnmap", address, segment.nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap a range. The caller has waited until no kernel uses it: the driver does not."""
        self._driver.call("cuMemUnmap", address, nbytes)

    def settle(self) -> bool:
        """Wait for all work of this process in the device's primary context, see :mod:`~.cuda.context`."""
        return context.settle(self._driver, self._number)

    def release(self, segment: Segment) -> None:  # noqa: D102 - documented by the interface
        own = self._own(segment)
        if own.released:
            return
        own.released = True
        self._driver.call("cuMemRelease", own.handle)
        if own.fd is not None:
            own.fd.close()

    def private_bytes(self, address: int, nbytes: int) -> int:  # noqa: ARG002 - the interface's
        """Return 0: a write to read-only GPU memory never makes a copy."""
        return 0

    def free_bytes(self) -> int | Unknown:
        """Return the free memory of the GPU, from NVML: asking CUDA would need a context."""
        return nvml.free_bytes(self.device)

    def total_bytes(self) -> int | Unknown:
        """Return the memory of the GPU, from NVML."""
        found = nvml.memory(self.device)
        return found if isinstance(found, Unknown) else found.total

    def _allocation(self, handle_type: Any) -> Any:
        types = self._driver.bindings
        properties = types.CUmemAllocationProp()
        properties.type = types.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = handle_type
        properties.location = self._location()
        return properties

    def _location(self) -> Any:
        types = self._driver.bindings
        location = types.CUmemLocation()
        location.type = types.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self._number
        return location

    @staticmethod
    def _own(segment: Segment) -> CudaSegment:
        assert isinstance(segment, CudaSegment)  # noqa: S101 - segments return to the backend that made them
        return segment
