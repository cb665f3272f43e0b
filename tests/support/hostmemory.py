"""Host memory by address, and what a child process finds out about it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path


def poke(address, data):
    """Write host memory."""
    ctypes.memmove(address, data, len(data))


def peek(address, nbytes):
    """Read host memory."""
    return ctypes.string_at(address, nbytes)


def mapped_ranges():
    """How many ranges this process's address space has."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def run_child(program, *arguments, pass_fds=()):
    """Run a Python program in a new process with some fds; its exit status, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        pass_fds=pass_fds,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.strip() or done.stderr.strip()


def shared_memory_bytes():
    """Memory of the machine that is in shared memory files (`Shmem` of `proc_meminfo(5)`)."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["Shmem"].split()[0]) * 1024
