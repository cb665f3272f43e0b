"""Check of what swapped workloads need: a directory on a disk."""

from __future__ import annotations

from typing import Final

from shared_store.base import envs
from shared_store.base.errors import ConfigError, WoolyError
from shared_store.cli.checks.check import Check
from shared_store.runtime import swap_files

_TRIED_BYTES: Final = 1 << 16
_ENOUGH_BYTES: Final = 8 << 30
"""Free space below which few workloads can be swapped out."""


def swap_directory() -> Check:
    """Create a file without a name in the swap directory, and look at the free space."""
    from shared_store.cli.render import size

    name = "swap directory"
    try:
        path = swap_files.directory(envs.SWAP_DIR.get())
        swap_files.create(path, _TRIED_BYTES).close()
        free = swap_files.free_bytes(path)
    except ConfigError as error:
        advice = "without one, workloads on cpu are not swapped, and others only as far as host memory allows"
        return Check(name, "warning", str(error), advice)
    except WoolyError as error:
        return Check(name, "warning", str(error), "set WOOLY_SWAP_DIR to a directory on a disk with free space")
    found = f"{path}, {size(free)} free"
    if swap_files.in_memory(path):
        return Check(name, "warning", f"{found}, is in memory", "set WOOLY_SWAP_DIR to a directory on a disk")
    if free < _ENOUGH_BYTES:
        return Check(name, "warning", found, "free disk space, or set WOOLY_SWAP_DIR to a larger disk")
    return Check(name, "ok", found)
