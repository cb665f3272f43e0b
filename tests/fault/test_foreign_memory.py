"""A process that is no workload takes memory of a `cpu` budget: it is not granted, and what is idle leaves for it.

Store and process are in a control group of their own, so that the memory of the machine's other processes is not seen.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.groups import MemoryGroup
from support.plain_workload import MIB, PlainWorkload
from support.waiting import wait_until

LIMIT = 1500 * MIB
"""Memory of the group. The store leaves 256 MiB of it, and needs some itself."""
TAKEN = 800
"""MiB that the foreign process takes: less than 500 are left."""
PROGRAM = (
    "import sys; sys.stdin.readline(); taken = bytes([1]) * int(sys.argv[1]); print('has it', flush=True); input()"
)


@pytest.fixture
def group():
    made = MemoryGroup()
    made.limit(LIMIT)
    yield made
    made.remove()


@pytest.fixture
def store(group, start_store, request):
    found = start_store(budget={"cpu": 1100 * MIB}, **request.param)
    group.add(found.pid)
    yield found
    found.kill()


class Foreign:
    """A process of the group that has memory until the block ends."""

    def __init__(self, group):
        command = [sys.executable, "-c", PROGRAM, str(TAKEN * MIB)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        group.add(self._process.pid)

    def __enter__(self):
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "has it\n"
        return self

    def __exit__(self, *_):
        self._process.communicate("end\n", timeout=60)
        assert self._process.returncode == 0


def status(one):
    return next(found for found in one.session.status().workloads if found.name == one.name)


@pytest.mark.parametrize("store", [{"vram_reserve": 0}], indirect=True)
def test_memory_of_a_foreign_process_is_not_granted_until_it_ends(group, store):
    """The wait says who has it, and how much of the budget that is."""
    with PlainWorkload(store.directory, "one", device="cpu", needs=900) as one:
        one.join(starting=True)
        with Foreign(group):
            waits = one.entering(timeout_s=120.0)
            wait_until(lambda: status(one).blocked_by == ("foreign processes",), "the wait")
            (device,) = one.session.status().devices
            assert device.budget_bytes == 1100 * MIB
            assert device.free_bytes < 500 * MIB
            assert any("of other processes" in line for line in one.explain().lines)
        waits.join(120)
        assert waits.answer.preempted == ()
        assert status(one).state == "resident"


RESERVE = {"vram_reserve": 500 * MIB, "idle_after_s": 0.0, "min_resident_s": 0.0}


@pytest.mark.parametrize("store", [RESERVE], indirect=True)
def test_an_idle_workload_leaves_when_a_foreign_process_takes_the_reserve(group, store):
    """It is away until the process ends, and returns when it has work again."""
    with PlainWorkload(store.directory, "idle", device="cpu", needs=400) as idle:
        idle.join(starting=True)
        idle.enter(timeout_s=120.0)
        assert not idle.asked
        with Foreign(group):
            assert idle.away.wait(120)
            assert "the reserve is used" in idle.asked[0].reason
            assert status(idle).state == "swapped"
        idle.enter(timeout_s=120.0)
        assert status(idle).state == "resident"
