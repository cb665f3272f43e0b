"""Segments in host memory: memfds, sealed against every further write once published.

Relies on: ``memfd_create(2)`` seals. ``F_SEAL_WRITE`` is refused while a writable shared mapping exists, and from then
on refuses ``write``, writable shared mappings and truncation, for every process and through ``/proc/self/fd`` as well.
Private (copy-on-write) mappings stay possible: they are what readers get, so a stray in-place write costs the writer a
page instead of its life, and never reaches anyone else.

Does not promise: that sealed memory is never swapped.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError
from shared_store.memory.backend import Access, Backend, Segment
from shared_store.memory.cgroup import group_free, machine_free
from shared_store.runtime import fds
from shared_store.runtime.fds import OwnedFd

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_HEADROOM = 256 << 20  # left to the machine: taking the last page would wake the kernel's killer, not raise an error

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


class MemfdSegment(Segment):
    """A memfd, owned by the segment."""

    def __init__(self, fd: OwnedFd, nbytes: int) -> None:
        super().__init__(nbytes)
        self.fd = fd


class MemfdBackend(Backend):
    """Host memory of this node."""

    device = "cpu"
    host_readable = True
    granularity = mmap.PAGESIZE

    def create(self, nbytes: int) -> MemfdSegment:  # noqa: D102 - the interface's
        free = self.free_bytes()
        if nbytes > free:
            raise OutOfMemoryError(f"no room for a segment of {nbytes} bytes on {self.device}: {free} bytes are free")
        try:
            fd = OwnedFd(os.memfd_create("wooly", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except OSError as error:
            raise _refused("cannot create a memfd", error) from error
        try:
            # Pages are allocated now: later, a full machine would kill whoever touches them instead of refusing.
            os.posix_fallocate(fd.fileno(), 0, nbytes)
        except OSError as error:
            fd.close()
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise OutOfMemoryError(
                    f"no room for a segment of {nbytes} bytes on {self.device}: {self.free_bytes()} bytes are free"
                ) from error
            raise MemoryBackendError(f"cannot allocate a memfd of {nbytes} bytes: {error.strerror}") from error
        return MemfdSegment(fd, nbytes)

    def export(self, segment: Segment) -> OwnedFd:  # noqa: D102 - the interface's
        return duplicate(self._fd(segment))

    def import_fd(self, fd: int, nbytes: int) -> MemfdSegment:  # noqa: D102 - the interface's
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only memory files answer
            size = os.fstat(fd).st_size
        except OSError as error:
            raise MemoryBackendError(f"fd {fd} is not a segment in host memory: {error.strerror}") from error
        if size < nbytes:
            raise MemoryBackendError(f"a segment of {size} bytes, where {nbytes} were announced")
        return MemfdSegment(duplicate(fd), nbytes)

    def seal(self, segment: Segment) -> None:  # noqa: D102 - the interface's
        fd = self._fd(segment)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS:
            return  # the last seal refuses all further ones, but a commit may be tried again
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise MemoryBackendError("the segment is still mapped for writing; unmap it before commit") from error
            raise MemoryBackendError(f"cannot seal the segment: {error.strerror}") from error

    def sealed(self, segment: Segment) -> bool:  # noqa: D102 - the interface's
        return fcntl.fcntl(self._fd(segment), fcntl.F_GET_SEALS) & _SEALS == _SEALS

    def reserve(self, nbytes: int) -> int:  # noqa: D102 - the interface's
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        return self._mmap(None, nbytes, _PROT_NONE, flags, -1)

    def unreserve(self, address: int, nbytes: int) -> None:  # noqa: D102 - the interface's
        if _libc.munmap(address, nbytes):
            raise MemoryBackendError(f"munmap: {os.strerror(ctypes.get_errno())}")

    def map(self, segment: Segment, address: int, access: Access) -> None:  # noqa: D102 - the interface's
        sharing = mmap.MAP_SHARED if access is Access.WRITE else mmap.MAP_PRIVATE | _MAP_NORESERVE
        self._mmap(address, segment.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, sharing | _MAP_FIXED, self._fd(segment))

    def unmap(self, address: int, nbytes: int) -> None:  # noqa: D102 - the interface's
        # Mapping nothing over it, instead of unmapping, keeps the range ours.
        self._mmap(address, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)

    def release(self, segment: Segment) -> None:  # noqa: D102 - the interface's
        if not segment.released:
            segment.released = True
            self._own(segment).fd.close()

    def private_bytes(self, address: int, nbytes: int) -> int:
        """Anonymous pages in the range, from ``/proc/self/smaps`` (see ``proc_pid_smaps(5)``)."""
        end, total, inside = address + nbytes, 0, False
        with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                head = line.split(maxsplit=1)[0]
                if "-" in head and not head.endswith(":"):
                    start, stop = (int(part, 16) for part in head.split("-"))
                    inside = start < end and stop > address
                elif inside and head == "Anonymous:":
                    total += int(line.split()[1]) * 1024
        return total

    def free_bytes(self) -> int:
        """Memory that the machine and this process's control group could still give, less a little headroom."""
        return max(0, min(machine_free(), group_free()) - _HEADROOM)

    @classmethod
    def _fd(cls, segment: Segment) -> int:
        return cls._own(segment).fd.fileno()

    @staticmethod
    def _own(segment: Segment) -> MemfdSegment:
        assert isinstance(segment, MemfdSegment)  # noqa: S101 - segments go back to the backend they came from
        return segment

    @staticmethod
    def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
        result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
        if result is None or result == _MAP_FAILED:
            raise MemoryBackendError(f"mmap of {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        return int(result)


def duplicate(fd: int) -> OwnedFd:
    """Duplicate a segment's descriptor. Raises :class:`MemoryBackendError`."""
    try:
        return fds.duplicate(fd)
    except OSError as error:
        raise _refused("cannot duplicate a segment's fd", error) from error


def _refused(what: str, error: OSError) -> MemoryBackendError:
    advice = "; raise the limit of open files (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return MemoryBackendError(f"{what}: {error.strerror}{advice}")
