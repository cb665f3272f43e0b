"""A driver whose states of processes are files, so that they outlive the helper that made them.

A file `stop` with the name of a call makes that call wait until the file is gone; `fail` makes it fail.
"""

import os
import time
from pathlib import Path

from shared_store.base.errors import MemoryBackendError
from shared_store.memory.cuda.checkpoint import ProcessState


class PlayedDriver:
    """The driver's calls, each a step between two states of a process."""

    def lock(self, pid, _timeout_s):
        self._step("lock", pid, ProcessState.RUNNING, ProcessState.LOCKED)

    def checkpoint(self, pid):
        self._step("checkpoint", pid, ProcessState.LOCKED, ProcessState.CHECKPOINTED)

    def restore(self, pid):
        self._step("restore", pid, ProcessState.CHECKPOINTED, ProcessState.LOCKED)

    def unlock(self, pid):
        self._step("unlock", pid, ProcessState.LOCKED, ProcessState.RUNNING)


class FileDriver(PlayedDriver):
    """`Checkpoints` of processes, in the directory that WOOLY_TEST_DRIVER names."""

    def __init__(self, directory=None):
        self.directory = Path(directory or os.environ["WOOLY_TEST_DRIVER"])

    def state(self, pid):
        try:
            return ProcessState[(self.directory / f"state-{pid}").read_text()]
        except FileNotFoundError:
            return ProcessState.RUNNING

    def mark(self, kind, call):
        (self.directory / kind).write_text(call)

    def unmark(self, kind):
        (self.directory / kind).unlink()

    def _is(self, kind, call):
        try:
            return (self.directory / kind).read_text() == call
        except FileNotFoundError:
            return False

    def _step(self, call, pid, before, after):
        at = self.directory / f"at-{os.getpid()}"
        at.write_text(f"{call} {os.getpid()}")
        at.rename(self.directory / "at")
        while self._is("stop", call):
            time.sleep(0.01)
        if self._is("fail", call):
            raise MemoryBackendError(f"{call} of {pid}: a test")
        if self.state(pid) is not before:
            raise MemoryBackendError(f"{call} of a process that is {self.state(pid)}")
        new = self.directory / f"new-{pid}"
        new.write_text(after.name)
        new.rename(self.directory / f"state-{pid}")
