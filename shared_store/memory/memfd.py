"""Segments in host memory: memfds, sealed against every write once published.

Relies on the seals of ``memfd_create(2)``. ``F_SEAL_WRITE`` is refused while a writable shared mapping exists.
Afterwards it refuses ``write``, writable shared mappings and truncation, for every process and also through
``/proc/self/fd``. Private (copy-on-write) mappings stay possible, and readers get these: a stray in-place write costs
its process one page, and no other process sees it.

Does not promise that sealed memory is never swapped out.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError
from shared_store.memory.backend import Access, Backend, Segment, Unknown
from shared_store.memory.cgroup import group_free, machine_free, machine_total
from shared_store.memory.descriptors import duplicate, refused
from shared_store.memory.pagemap import written_bytes
from shared_store.runtime.fds import OwnedFd

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_HEADROOM = 256 << 20  # never allocated: taking the last page invokes the kernel's OOM killer instead of an error

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def is_memory_file(fd: int) -> bool:
    """Whether a descriptor is that of a memfd, of any process."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:")
    except OSError:
        return False


class MemfdSegment(Segment):
    """A memfd, owned by the segment."""

    def __init__(self, fd: OwnedFd, nbytes: int) -> None:
        super().__init__(nbytes)
        self.fd = fd
        self.private = False
        """True if it is never exported, and left out of core dumps and children: a KV cache has prompts and answers."""


class MemfdBackend(Backend):
    """Host memory of this node."""

    device = "cpu"
    host_readable = True
    zeroed = True
    granularity = mmap.PAGESIZE

    def create(self, nbytes: int) -> MemfdSegment:  # noqa: D102 - documented by the interface
        return self._allocate(nbytes, "wooly")

    def create_private(self, nbytes: int) -> MemfdSegment:  # noqa: D102 - documented by the interface
        segment = self._allocate(nbytes, "private (wooly)")
        segment.private = True
        return segment

    def _allocate(self, nbytes: int, name: str) -> MemfdSegment:
        """Allocate memory under a name, which the kernel shows in the lists of mappings and descriptors."""
        free = self._available()
        if nbytes > free:
            raise self._out_of_memory(nbytes, free)
        try:
            fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except OSError as error:
            raise refused("cannot create a memfd", error) from error
        try:
            # Allocate the pages now. Later, a full machine kills the process that touches them instead of refusing.
            os.posix_fallocate(fd.fileno(), 0, nbytes)
        except OSError as error:
            fd.close()
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise self._out_of_memory(nbytes, self._available()) from error
            raise MemoryBackendError(f"cannot allocate a memfd of {nbytes} bytes: {error.strerror}") from error
        return MemfdSegment(fd, nbytes)

    def export(self, segment: Segment) -> OwnedFd:  # noqa: D102 - documented by the interface
        return duplicate(self._fd(segment))

    def import_fd(self, fd: int, nbytes: int) -> MemfdSegment:  # noqa: D102 - documented by the interface
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # refused for everything but memory files
            size = os.fstat(fd).st_size
        except OSError as error:
            raise MemoryBackendError(f"descriptor {fd} is not a segment in host memory: {error.strerror}") from error
        if size < nbytes:
            raise MemoryBackendError(f"the segment has {size} bytes, where {nbytes} were announced")
        return MemfdSegment(duplicate(fd), nbytes)

    def seal(self, segment: Segment) -> None:  # noqa: D102 - documented by the interface
        fd = self._fd(segment)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS:
            return  # F_SEAL_SEAL refuses further seals, but a commit may be repeated
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise MemoryBackendError("the segment is still mapped for writing; unmap it before commit") from error
            raise MemoryBackendError(f"cannot seal the segment: {error.strerror}") from error

    def sealed(self, segment: Segment) -> bool:  # noqa: D102 - documented by the interface
        return fcntl.fcntl(self._fd(segment), fcntl.F_GET_SEALS) & _SEALS == _SEALS

    def reserve(self, nbytes: int) -> int:  # noqa: D102 - documented by the interface
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        return self._mmap(None, nbytes, _PROT_NONE, flags, -1)

    def unreserve(self, address: int, nbytes: int) -> None:  # noqa: D102 - documented by the interface
        if _libc.munmap(address, nbytes):
            raise MemoryBackendError(f"munmap: {os.strerror(ctypes.get_errno())}")

    def map(self, segment: Segment, address: int, access: Access) -> None:  # noqa: D102 - documented by the interface
        sharing = mmap.MAP_SHARED if access is Access.WRITE else mmap.MAP_PRIVATE | _MAP_NORESERVE
        self._mmap(address, segment.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, sharing | _MAP_FIXED, self._fd(segment))
        if self._own(segment).private:
            for advice in (mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK):  # a child would keep memory that this process frees
                if _libc.madvise(address, segment.nbytes, advice):
                    raise MemoryBackendError(f"madvise of {segment.nbytes} bytes: {os.strerror(ctypes.get_errno())}")

    def unmap(self, address: int, nbytes: int) -> None:
        """Replace the mapping by an inaccessible one: ``munmap`` would let other code have the range."""
        self._mmap(address, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)

    def release(self, segment: Segment) -> None:  # noqa: D102 - documented by the interface
        segment.released = True
        self._own(segment).fd.close()

    def private_bytes(self, address: int, nbytes: int) -> int:  # noqa: D102 - documented by the interface
        return written_bytes(address, nbytes)

    def free_bytes(self) -> int:
        """Estimate what the machine and this process's control group have left, less a headroom of 256 MiB."""
        return self._available()

    def total_bytes(self) -> int | Unknown:
        """Return the memory of the machine."""
        return machine_total()

    def _available(self) -> int:
        return max(0, min(machine_free(), group_free()) - _HEADROOM)

    def _out_of_memory(self, nbytes: int, free: int) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"cannot allocate a segment of {nbytes} bytes on {self.device}: {free} bytes are free; free host memory, "
            "or raise the memory limit of this container"
        )

    @classmethod
    def _fd(cls, segment: Segment) -> int:
        return cls._own(segment).fd.fileno()

    @staticmethod
    def _own(segment: Segment) -> MemfdSegment:
        assert isinstance(segment, MemfdSegment)  # noqa: S101 - segments return to the backend that made them
        return segment

    @staticmethod
    def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
        result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
        if result is None or result == _MAP_FAILED:
            raise MemoryBackendError(f"mmap of {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        return int(result)
