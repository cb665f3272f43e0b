"""Takes the processes of one workload off their GPU together, and brings them back together.

A step that fails is undone, so that all processes run, or all are off the GPU. A checkpointer that begins finds out
which of both an earlier one, which was killed, left unfinished, and brings the processes back then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from shared_store.base.errors import DeclinedError, MemoryBackendError, WoolyError
from shared_store.memory.cuda.checkpoint import ProcessState


class Calls(Protocol):
    """The driver's calls: :class:`shared_store.memory.cuda.checkpoint.Checkpoints`."""

    def state(self, pid: int, /) -> ProcessState:
        """Return a process's state."""

    def lock(self, pid: int, timeout_s: float, /) -> None:
        """Lock a process."""

    def checkpoint(self, pid: int, /) -> None:
        """Take a locked process off its GPU."""

    def restore(self, pid: int, /) -> None:
        """Bring a process back; it is locked."""

    def unlock(self, pid: int, /) -> None:
        """Unlock a process."""


class Checkpointer:
    """The processes of one workload.

    Attributes:
        pids: of the processes that are off the GPU; empty while they run.
    """

    def __init__(self, calls: Calls, find: Callable[[], Sequence[int]]) -> None:
        """Begin. ``find`` returns the pids of the processes that have a GPU open."""
        self.pids: tuple[int, ...] = ()
        self._calls = calls
        self._find = find

    def resume(self, pids: Sequence[int]) -> None:
        """Take over from a checkpointer that ended.

        Processes that are all off the GPU stay there. Where only some are, or some are locked, all are brought back.

        Args:
            pids: the processes that it may have locked.

        Raises:
            MemoryBackendError: a process cannot be brought back.
        """
        states = {pid: self._calls.state(pid) for pid in pids}
        if states and set(states.values()) == {ProcessState.CHECKPOINTED}:
            self.pids = tuple(pids)
            return
        self._bring_back([pid for pid, state in states.items() if state is ProcessState.CHECKPOINTED])
        for pid, state in states.items():
            if state is ProcessState.LOCKED:
                self._calls.unlock(pid)

    def take_off(self, within_s: float, locked: Callable[[Sequence[int]], None] = lambda _: None) -> None:
        """Take all processes off the GPU. Does nothing if they are.

        Args:
            within_s: seconds for their work on the GPU to end.
            locked: called with the pids before the first is locked, to be remembered for :meth:`resume`.

        Raises:
            DeclinedError: a step failed, or no process has a GPU open. All processes run.
            MemoryBackendError: a step failed, and a process could not be brought back.
        """
        if self.pids:
            return
        pids = tuple(self._find())
        if not pids:
            raise DeclinedError("no process of the workload has a GPU open")
        locked(pids)
        until = time.monotonic() + within_s
        taken: list[int] = []
        off: list[int] = []
        try:
            for pid in pids:
                self._calls.lock(pid, max(0.001, until - time.monotonic()))
                taken.append(pid)
            for pid in pids:
                self._calls.checkpoint(pid)
                off.append(pid)
        except WoolyError as error:
            self.pids = tuple(taken) if off else ()  # bring_back tries again if one cannot be restored now
            self._restore(off)
            self.pids = ()
            for pid in taken:
                with contextlib.suppress(MemoryBackendError):  # it ended; the first error is the one to report
                    self._calls.unlock(pid)
            raise DeclinedError(f"the driver does not take the workload off its GPU: {error} [{error.code}]") from error
        self.pids = pids

    def bring_back(self) -> None:
        """Bring all processes back. Does nothing if they run.

        Raises:
            MemoryBackendError: the driver cannot restore a process. It stays off the GPU, and can be tried again.
        """
        self._bring_back(self.pids)
        self.pids = ()

    def _bring_back(self, pids: Sequence[int]) -> None:
        self._restore(pids)
        for pid in pids:
            self._calls.unlock(pid)

    def _restore(self, pids: Sequence[int]) -> None:
        """Restore those processes that are not restored already: an earlier attempt may have failed in between."""
        for pid in pids:
            if self._calls.state(pid) is ProcessState.CHECKPOINTED:
                self._calls.restore(pid)
