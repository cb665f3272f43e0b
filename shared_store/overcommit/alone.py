"""Memory for a workload that returns without a store: one process of a node at a time on each device.

The store's accounts are gone, so that only what the device has free counts, and the reserve stays free. The lock is
:mod:`shared_store.runtime.device_lock`'s; a process that is killed has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.memory import cgroup
from shared_store.memory.backend import Unknown
from shared_store.memory.cuda import nvml
from shared_store.runtime import device_lock
from shared_store.runtime.options import CPU_RESERVE_BYTES, GPU_RESERVE_BYTES


@contextlib.contextmanager
def memory(needs: Mapping[str, int]) -> Iterator[str]:
    """Lock devices for the block, and compare what they have free with what is needed.

    Args:
        needs: bytes that will be allocated on each device.

    Yields:
        Why the memory cannot be had now; empty if it can.
    """
    with contextlib.ExitStack() as locks:
        yield next(filter(None, (_blocked(device, needs[device], locks) for device in sorted(needs))), "")


def _blocked(device: str, nbytes: int, locks: contextlib.ExitStack) -> str:
    """Return why memory of a device cannot be had, having its lock; empty if it can."""
    try:
        lock = device_lock.try_lock(device, device_lock.RETURNS)
    except ConfigError as error:
        return str(error)
    if lock is None:
        return f"another process returns to {device} without a store"
    locks.enter_context(lock)
    free = _free_bytes(device)
    if isinstance(free, Unknown):
        return f"the free memory of {device} is unknown: {free.reason}"
    reserve = envs.VRAM_RESERVE.get()
    if reserve is None:
        reserve = CPU_RESERVE_BYTES if device == "cpu" else GPU_RESERVE_BYTES
    if free < nbytes + reserve:
        return (
            f"{device} has {free >> 20} MiB free; {nbytes >> 20} MiB are needed, beside a reserve of "
            f"{reserve >> 20} MiB"
        )
    return ""


def _free_bytes(device: str) -> int | Unknown:
    if device == "cpu":
        return min(cgroup.machine_free(), cgroup.group_free())
    return nvml.free_bytes(device)
