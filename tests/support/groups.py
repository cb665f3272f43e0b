"""A control group with a limit of memory, of either version of the kernel's interface."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.waiting import wait_until


class MemoryGroup:
    """A group of this test's own. `add` moves a process in: what it allocates from then on counts."""

    def __init__(self):
        root = Path("/sys/fs/cgroup")
        old = (root / "memory" / "memory.limit_in_bytes").exists()
        self._directory = (root / "memory" if old else root) / f"wooly-test-{os.getpid()}"
        self._limit = self._directory / ("memory.limit_in_bytes" if old else "memory.max")
        try:
            self._directory.mkdir()
        except OSError as error:
            pytest.skip(f"this process may not make a control group: {error}")
        if not self._limit.exists():
            self._directory.rmdir()
            pytest.skip("control groups here do not limit memory")

    def limit(self, nbytes):
        self._limit.write_text(str(nbytes))

    def add(self, pid):
        (self._directory / "cgroup.procs").write_text(str(pid))

    def remove(self):
        """Once its processes have ended."""
        wait_until(lambda: not (self._directory / "cgroup.procs").read_text(), "the group's processes to end")
        self._directory.rmdir()
