"""Checks of the host: Python and kernel, sealed memory files, the limit of open files."""

from __future__ import annotations

import os
import platform
import resource
import sys
from typing import Final

from shared_store.base.errors import WoolyError
from shared_store.cli.checks.check import Check

ENOUGH_FDS: Final = 4096
_PYTHON_NEEDED: Final = (3, 11)


def python() -> Check:
    """Check the versions of Python and of the operating system."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.release()} ({platform.machine()})"
    if sys.version_info < _PYTHON_NEEDED:
        return Check("python", "failed", found, "install Python {}.{} or newer".format(*_PYTHON_NEEDED))
    if sys.platform != "linux":
        return Check("python", "failed", found, "use Linux: wooly needs memfd, SO_PEERCRED and pidfd")
    return Check("python", "ok", found)


def host_memory() -> Check:
    """Create a memfd, seal it, and try to write to it."""
    from shared_store.cli.render import size
    from shared_store.memory import MemfdBackend

    name = "host memory"
    backend = MemfdBackend()
    try:
        segment = backend.create(backend.granularity)
        try:
            backend.seal(segment)
            try:
                os.pwrite(segment.fd.fileno(), b"x", 0)
            except PermissionError:
                found = f"memfd and seals work, {size(backend.free_bytes())} free; /dev/shm is not used"
                return Check(name, "ok", found)
        finally:
            backend.release(segment)
    except WoolyError as error:
        advice = "free some memory; if enough is free, check whether the kernel or a sandbox forbids memfd_create"
        return Check(name, "failed", str(error), advice)
    advice = "use a kernel with working memfd seals (Linux 3.17 or newer)"
    return Check(name, "failed", "a sealed memfd can be written to", advice)


def file_limit() -> Check:
    """Check the hard limit of open files, which the store raises its soft limit to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Check("open files", "ok", "no limit")
    found = f"soft limit {soft}, hard limit {hard} (the store uses the hard limit)"
    if hard < ENOUGH_FDS:
        advice = (
            f"raise the hard limit to {ENOUGH_FDS}: LimitNOFILE= of the service, --ulimit nofile= of the container, "
            "or limits.conf"
        )
        return Check("open files", "warning", found, advice)
    return Check("open files", "ok", found)
