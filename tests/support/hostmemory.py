"""Host memory by address, and what a child process finds out about it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path


def poke(address, data):
    """Write memory: the host's, or a GPU's once :func:`reach_gpu_memory` was called."""
    buffer = ctypes.create_string_buffer(bytes(data), len(data))
    _copy(address, ctypes.addressof(buffer), len(data))


def peek(address, nbytes):
    """Read memory, as :func:`poke` writes it."""
    buffer = ctypes.create_string_buffer(nbytes)
    _copy(ctypes.addressof(buffer), address, nbytes)
    return buffer.raw


def _copy(target, source, nbytes):
    if _gpu_copy is None:
        ctypes.memmove(target, source, nbytes)
    else:
        _gpu_copy(target, source, nbytes)


_gpu_copy = None


def reach_gpu_memory(ordinal):
    """From now on copy with the driver, which tells host and GPU addresses apart (unified addressing)."""
    global _gpu_copy  # noqa: PLW0603 - one context a process is how the driver sees it as well
    from cuda.bindings import driver

    error, context = driver.cuDevicePrimaryCtxRetain(ordinal)
    assert not error, error.name
    assert not driver.cuCtxSetCurrent(context)[0]

    def copy(target, source, nbytes):
        (error,) = driver.cuMemcpy(target, source, nbytes)
        assert not error, error.name
        driver.cuCtxSynchronize()

    _gpu_copy = copy


def reach_host_memory():
    """From now on copy with the processor."""
    global _gpu_copy  # noqa: PLW0603 - see above
    _gpu_copy = None


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
