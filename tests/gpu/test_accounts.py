"""The account of a GPU: its budget is the physical memory, others are seen, and one store of the node grants it."""

from __future__ import annotations

import pytest
from support.fixtures import directory
from support.plain_workload import MIB, PlainWorkload
from support.stores import StoreProcess
from support.waiting import wait_until

from shared_store.memory import backend_for
from shared_store.memory.cuda import nvml
from shared_store.runtime.device_lock import GRANTS, try_lock

__all__ = ["directory"]

pytestmark = pytest.mark.gpu

SLACK = 64 * MIB
"""Bytes that the driver may take or return meanwhile."""


@pytest.fixture
def store(directory):
    """A store without budgets; its catalog is unreachable."""
    started = StoreProcess(directory, redis_url=f"unix://{directory}/away").start()
    yield started
    started.clean_up()


def device(one, gpu):
    return next(found for found in one.session.status().devices if found.id == gpu)


def test_the_memory_of_a_gpu_is_its_budget_and_others_are_seen(gpu, store, vram_returned):  # noqa: ARG001 - checks VRAM
    """A segment of this process stands for that of a process that is no workload."""
    with PlainWorkload(store.directory, "one", device=gpu, needs=512) as one:
        one.join(starting=True)
        one.take_room()
        found = device(one, gpu)
        assert found.budget_bytes == nvml.memory(gpu).total
        assert found.granted_bytes == 512 * MIB
        assert abs(found.free_bytes + found.reserve_bytes + found.granted_bytes - nvml.memory(gpu).free) < SLACK
        one.report("resident")
        before = device(one, gpu).foreign_bytes
        backend = backend_for(gpu)
        other = backend.create(1 << 30)
        try:
            one.report("resident")
            wait_until(lambda: device(one, gpu).foreign_bytes >= before + (1 << 30) - SLACK, "the foreign memory")
        finally:
            backend.release(other)
        wait_until(lambda: device(one, gpu).foreign_bytes <= before + SLACK, "its end")


def test_only_one_store_grants_a_gpu(gpu, store):
    """The other one starts its workloads as without overcommit, and says why."""
    with PlainWorkload(store.directory, "one", device=gpu, needs=512) as one:
        one.join(starting=True)
        assert device(one, gpu).overcommit
        assert try_lock(gpu, GRANTS) is None
    held = store.stop()
    assert held == 0
    with try_lock(gpu, GRANTS):
        again = StoreProcess(store.directory, redis_url=f"unix://{store.directory}/away").start()
        with PlainWorkload(store.directory, "one", device=gpu, needs=512) as one:
            one.join(starting=True)
            assert one.take_room().waited_s < 1
            assert "another store on this node grants its memory" in device(one, gpu).overcommit_refusal
        again.clean_up()
