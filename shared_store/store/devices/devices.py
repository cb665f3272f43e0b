"""The backends of devices, and the memory of each allocated segment by its id.

The state knows segments as numbers; this module connects the numbers to memory. Slow calls (:meth:`Devices.allocate`,
:meth:`Devices.find`, :meth:`Devices.seal`, :meth:`Check.wrong`) run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from shared_store.base.errors import UnknownDeviceError
from shared_store.base.manifest import Blob
from shared_store.memory import Backend, FdSegment, Segment, Unknown, backend_for
from shared_store.memory import Mapping as MemoryMapping
from shared_store.memory.mapping import close_all
from shared_store.memory.transfer import Copy, HostTransfer, copy_blobs
from shared_store.runtime.fds import OwnedFd, OwnedFds
from shared_store.store.devices.digest_check import Check, mapping_of
from shared_store.store.state.residency import FILES

log = logging.getLogger(__name__)


class Devices:
    """The memory of a store. Owns the memory of every segment that was added, until it is released."""

    def __init__(self, backends: Mapping[str, Backend], find_backend: Callable[[str], Backend] = backend_for) -> None:
        """Begin with some backends; others are looked up when a client names their devices."""
        self.backends = dict(backends)
        self._find_backend = find_backend
        self._memory: dict[int, tuple[str, Segment]] = {}
        self._unknown: set[tuple[str, str]] = set()

    async def find(self, device: str) -> Backend:
        """Return the backend of a device that a client names; look it up in a thread if it is new.

        Raises:
            UnknownDeviceError: there is no such device on this node.
        """
        if device == FILES:
            raise UnknownDeviceError(f"{device!r} is a tier, not a device of models")
        if device not in self.backends:
            backend = await asyncio.to_thread(self._find_backend, device)
            self.backends.setdefault(backend.device, backend)
        return self.backend(device)

    def add(self, backend: Backend) -> None:
        """Add a backend, unless its device has one."""
        self.backends.setdefault(backend.device, backend)

    def backend(self, device: str) -> Backend:
        """Return the backend of a device. Raises :class:`UnknownDeviceError` that lists the devices."""
        try:
            return self.backends[device]
        except KeyError:
            known = ", ".join(sorted(self.backends))
            raise UnknownDeviceError(f"this store has no device {device!r}; it has: {known}") from None

    async def allocate(self, device: str, nbytes: int) -> Segment:
        """Allocate memory in a thread; :meth:`put` or the backend's ``release`` must follow.

        A task that is cancelled meanwhile leaves no memory behind: it is released when the thread has it.

        Raises:
            OutOfMemoryError: the device has not enough free memory.
        """
        backend = self.backend(device)
        work = asyncio.ensure_future(asyncio.to_thread(backend.create, nbytes))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda done: _drop(backend, done))
            raise

    async def free_bytes(self, device: str) -> int | Unknown:
        """Return an estimate of the bytes that can be allocated; measured in a thread. Logs a reason once."""
        free = await asyncio.to_thread(self.backend(device).free_bytes)
        if isinstance(free, Unknown) and (device, free.reason) not in self._unknown:
            self._unknown.add((device, free.reason))
            log.warning(
                "free memory of %s is unknown, so eviction does not estimate and compaction is off: %s",
                device,
                free.reason,
            )
        return free

    def put(self, segment: int, device: str, memory: Segment) -> None:
        """Take over the memory of a segment."""
        self._memory[segment] = (device, memory)

    def memory(self, segment: int) -> Segment | None:
        """Return the memory of a segment, if it is allocated."""
        return self._memory[segment][1] if segment in self._memory else None

    def release(self, segment: int) -> tuple[str, int] | None:
        """Release the memory of a segment; return its device and size in bytes, or None if it was never allocated."""
        if segment not in self._memory:
            return None
        device, memory = self._memory.pop(segment)
        self._release(device, memory)
        return device, memory.nbytes

    def close(self) -> None:
        """Release the memory of all segments."""
        for segment in list(self._memory):
            self.release(segment)

    def export(self, segment: int, *, writable: bool = False) -> OwnedFd:
        """Return a new descriptor of an allocated segment. ``writable``: for the client that fills it."""
        device, memory = self._memory[segment]
        if isinstance(memory, FdSegment):  # from the keeper; its device's driver may not have started
            return memory.export()
        backend = self.backend(device)
        return backend.export_writable(memory) if writable else backend.export(memory)

    def export_all(self, segments: Iterable[int]) -> OwnedFds:
        """Return a new descriptor of each allocated segment, in order."""
        with contextlib.ExitStack() as failed:
            fds = failed.enter_context(OwnedFds())
            for segment in segments:
                fds.add(self.export(segment))
            failed.pop_all()
        return fds

    def map(self, segment: int) -> MemoryMapping:
        """Return a mapping with its own reference to the segment's memory. The caller closes it."""
        device, memory = self._memory[segment]
        return mapping_of(self.backend(device), memory)

    def copying(self, source: int, device: str, target: Segment) -> Callable[[], None]:
        """Return a function that copies an allocated segment to memory that is none yet, for a thread.

        It has its own references to both, and must be called.
        """
        mappings: list[MemoryMapping] = []
        try:
            mappings.append(self.map(source))
            backend = self.backend(device)
            with backend.export_writable(target) as fd:
                mappings.append(MemoryMapping(backend, backend.import_fd(fd.fileno(), target.nbytes)))
        except BaseException:
            close_all(mappings)
            raise

        def copy() -> None:
            try:
                copy_blobs(HostTransfer(), mappings[:1], mappings[1], [Copy(0, 0, 0, mappings[0].nbytes)])
            finally:
                close_all(mappings)

        return copy

    async def seal(self, segments: Iterable[int]) -> None:
        """Make allocated segments immutable, in a thread: the kernel visits each of their pages.

        Segments may be released meanwhile.

        Raises:
            MemoryBackendError: one is mapped for writing.
        """
        with contextlib.ExitStack() as own:
            memories: list[tuple[Backend, Segment]] = []
            for segment in segments:
                if segment in self._memory:
                    device, memory = self._memory[segment]
                    backend = self.backend(device)
                    if backend.host_readable:  # elsewhere nothing is sealed
                        with self.export(segment) as fd:
                            memory = backend.import_fd(fd.fileno(), memory.nbytes)
                        own.callback(backend.release, memory)
                    memories.append((backend, memory))
            await asyncio.to_thread(_seal, memories)

    def check(self, written: Mapping[int, Sequence[tuple[Blob, int]]]) -> Check:
        """Return a check of blobs at their first bytes, by segment, of those devices that the host can read.

        Elsewhere the client that wrote the blobs digests them.
        """
        parts = []
        for segment, blobs in written.items():
            if segment in self._memory:
                device, memory = self._memory[segment]
                backend = self.backend(device)
                if backend.host_readable:
                    parts.append((backend, memory, blobs))
        return Check(parts)

    def _release(self, device: str, memory: Segment) -> None:
        if isinstance(memory, FdSegment):
            memory.release()
        else:
            self.backend(device).release(memory)


def _seal(memories: Sequence[tuple[Backend, Segment]]) -> None:
    for backend, memory in memories:
        backend.seal(memory)


def _drop(backend: Backend, done: asyncio.Future[Segment]) -> None:
    """Release memory that was allocated for a task that was cancelled."""
    if not done.cancelled() and done.exception() is None:
        backend.release(done.result())
