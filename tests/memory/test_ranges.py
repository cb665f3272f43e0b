"""Private ranges on every backend: they leave, return at the same addresses, and return together or not at all."""

from __future__ import annotations

import gc
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.hostmemory import peek, poke, run_child
from support.mapped import flags_at
from support.waiting import open_fds

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError
from shared_store.memory import MemfdBackend
from shared_store.memory.fake import FakeBackend
from shared_store.memory.unmapping import captures
from shared_store.private.ranges import PrivateMemory

PART = 4 << 20
"""Bytes of a mapping in these tests, a multiple of every backend's granularity."""

SMALL = 64 << 10
"""The same, where the backend is the fake one."""


@pytest.fixture
def memory(backend):
    return PrivateMemory(backend, part_bytes=PART)


def test_a_range_has_writable_memory_up_to_its_last_byte(memory, capable):
    capable("host_access")
    found = memory.allocate(3 * PART + 1)
    assert found.nbytes % memory.backend.granularity == 0
    assert 3 * PART < found.nbytes <= 3 * PART + (2 << 20)
    for offset in (0, PART - 1, PART, 3 * PART, found.nbytes - 1):
        poke(found.address + offset, b"!")
    assert peek(found.address + PART - 1, 2) == b"!!"
    assert memory.nbytes == memory.mapped_bytes == found.nbytes


def test_ranges_return_at_their_addresses_zeroed_where_the_backend_says_so(memory, capable):
    capable("host_access")
    ranges = [memory.allocate(PART), memory.allocate(2 * PART)]
    addresses = [it.address for it in ranges]
    for _ in range(3):
        for it in ranges:
            poke(it.address + it.nbytes - 4, b"last")
        memory.go_away()
        assert memory.away
        assert memory.mapped_bytes == 0
        assert not any(it.mapped for it in ranges)
        memory.come_back()
        assert not memory.away
        assert [it.address for it in ranges] == addresses
        assert memory.mapped_bytes == memory.nbytes == 3 * PART
        if memory.backend.zeroed:
            assert all(peek(it.address + it.nbytes - 4, 4) == bytes(4) for it in ranges)


def test_addresses_of_a_range_that_is_away_stay_reserved(backend, memory):
    found = memory.allocate(PART)
    memory.go_away()
    others = [backend.reserve(PART) for _ in range(100)]
    taken = range(found.address, found.address + found.nbytes)
    assert not any(other in taken or other + PART - 1 in taken for other in others)
    for other in others:
        backend.unreserve(other, PART)
    memory.come_back()


def test_leaving_and_returning_twice_change_nothing(memory, capable):
    capable("host_access")
    found = memory.allocate(PART)
    memory.come_back()
    poke(found.address, b"kept")
    memory.come_back()
    assert peek(found.address, 4) == b"kept"
    memory.go_away()
    memory.go_away()
    memory.come_back()
    assert found.mapped


def test_ranges_use_no_descriptors(memory):
    before = open_fds()
    found = memory.allocate(3 * PART)
    assert open_fds() == before
    memory.go_away()
    memory.come_back()
    assert open_fds() == before
    assert found.mapped


def test_host_memory_of_ranges_is_left_out_of_core_dumps_and_children():
    """After a return too. A KV cache has prompts and answers; and a child would keep memory that its parent frees."""
    memory = PrivateMemory(MemfdBackend(), part_bytes=PART)
    found = memory.allocate(2 * PART)
    for _ in range(2):
        for address in (found.address, found.address + found.nbytes - 1):
            assert {"dd", "dc"} <= set(flags_at(address))
        memory.go_away()
        memory.come_back()


def test_a_range_that_nothing_refers_to_is_freed(memory):
    """Whether it is on its device or away."""
    here, away = memory.allocate(PART), memory.allocate(PART)
    memory.go_away()
    memory.come_back()
    del here
    gc.collect()
    assert memory.nbytes == PART
    memory.go_away()
    del away
    gc.collect()
    assert memory.nbytes == 0
    memory.come_back()
    assert memory.mapped_bytes == 0


def test_memory_that_is_away_faults(capable):
    """Reading it ends the process, instead of returning bytes of something else."""
    capable("host_access")
    program = """
import ctypes
from shared_store.memory import MemfdBackend
from shared_store.private.ranges import PrivateMemory
memory = PrivateMemory(MemfdBackend())
found = memory.allocate(1 << 21)
ctypes.string_at(found.address, 1)
memory.go_away()
print("away", flush=True)
ctypes.string_at(found.address, 1)
"""
    status, output = run_child(program)
    assert (status, output) == (-signal.SIGSEGV, "away")


def test_memory_of_ranges_that_are_away_is_free_for_others():
    backend = FakeBackend(capacity=8 * PART)
    memory = PrivateMemory(backend, part_bytes=PART)
    kept = memory.allocate(6 * PART)
    assert backend.allocated_bytes == 6 * PART
    memory.go_away()
    assert backend.allocated_bytes == 0
    other = PrivateMemory(backend, part_bytes=PART).allocate(8 * PART)
    with pytest.raises(OutOfMemoryError):
        memory.come_back()
    assert memory.away
    assert backend.allocated_bytes == 8 * PART
    del other
    gc.collect()
    memory.come_back()
    assert kept.mapped


@pytest.mark.parametrize("call", ["create", "map"])
@pytest.mark.parametrize("nth", range(1, 6))
def test_a_return_that_fails_at_any_part_leaves_nothing_behind(call, nth):
    backend = FakeBackend()
    memory = PrivateMemory(backend, part_bytes=PART)
    ranges = [memory.allocate(2 * PART), memory.allocate(3 * PART)]
    memory.go_away()
    backend.faults.fail_at(call, nth)
    with pytest.raises(MemoryBackendError, match="as planned"):
        memory.come_back()
    assert memory.away
    assert backend.allocated_bytes == memory.mapped_bytes == 0
    memory.come_back()
    assert all(it.mapped for it in ranges)
    assert backend.allocated_bytes == 5 * PART


@pytest.mark.parametrize("nth", range(1, 4))
def test_an_unmapping_that_fails_is_repaired_by_a_return(nth):
    backend = FakeBackend()
    memory = PrivateMemory(backend, part_bytes=PART)
    found = memory.allocate(3 * PART)
    backend.faults.fail_at("unmap", nth)
    with pytest.raises(MemoryBackendError, match="as planned"):
        memory.go_away()
    memory.come_back()
    assert found.mapped
    assert backend.allocated_bytes == 3 * PART


def test_an_allocation_that_fails_frees_what_it_took():
    backend = FakeBackend(capacity=3 * PART)
    memory = PrivateMemory(backend, part_bytes=PART)
    with pytest.raises(OutOfMemoryError):
        memory.allocate(4 * PART)
    gc.collect()
    assert backend.allocated_bytes == memory.nbytes == 0


def test_leaving_waits_for_work_in_flight():
    """The work would fault if its memory were unmapped."""
    backend = FakeBackend()
    memory = PrivateMemory(backend, part_bytes=PART)
    found = memory.allocate(2 * PART)
    started, go_on = threading.Event(), threading.Event()

    def work():
        started.set()
        go_on.wait()
        poke(found.address + PART, b"written late")

    backend.launch(work)
    started.wait()
    leaving = threading.Thread(target=memory.go_away)
    leaving.start()
    go_on.set()
    leaving.join()
    assert memory.mapped_bytes == 0
    assert backend.calls.index("settle") < backend.calls.index("unmap")


def test_nothing_leaves_while_a_graph_is_captured():
    backend = FakeBackend()
    backend.asynchronous = True
    memory = PrivateMemory(backend, part_bytes=PART)
    found = memory.allocate(PART)
    graph = threading.Event()  # any object
    captures.begin(graph)
    try:
        with pytest.raises(MemoryBackendError, match="graph"):
            memory.go_away()
    finally:
        captures.end(graph)
    assert found.mapped
    assert not memory.away
    memory.go_away()
    assert memory.away


def test_mapping_and_unmapping_happen_in_a_phase_and_allocations_outside_of_it():
    backend = FakeBackend()
    inside = []

    class Phase:
        def __enter__(self):
            inside.append(backend.allocated_bytes)

        def __exit__(self, *_):
            inside.append(backend.allocated_bytes)

    memory = PrivateMemory(backend, Phase, part_bytes=PART)
    found = memory.allocate(2 * PART)
    memory.go_away()
    memory.come_back()
    assert found.mapped
    assert inside == [2 * PART, 2 * PART, 2 * PART, 0, 2 * PART, 2 * PART]


class Ranges(RuleBasedStateMachine):
    """Ranges with planned faults against a model: a byte of each range, None where it is lost."""

    @initialize(zeroed=st.booleans())
    def begin(self, zeroed):
        self.backend = FakeBackend(capacity=12 * SMALL, zeroed=zeroed)
        self.memory = PrivateMemory(self.backend, part_bytes=SMALL)
        self.ranges, self.bytes = {}, {}

    @rule(parts=st.integers(1, 4))
    def allocate(self, parts):
        number = len(self.bytes) + 1
        try:
            self.ranges[number] = self.memory.allocate(parts * SMALL)
        except OutOfMemoryError:
            return
        self.bytes[number] = number
        poke(self.ranges[number].address, bytes([number]))

    @precondition(lambda self: self.ranges)
    @rule(data=st.data())
    def drop(self, data):
        del self.ranges[data.draw(st.sampled_from(sorted(self.ranges)))]

    @rule()
    def leave(self):
        self.memory.go_away()
        self.bytes = dict.fromkeys(self.bytes)

    @rule(call=st.sampled_from(["", "create", "map"]), nth=st.integers(1, 6))
    def come_back(self, call, nth):
        before = self.memory.mapped_bytes
        if call:
            self.backend.faults.fail_at(call, nth)
        try:
            self.memory.come_back()
        except (MemoryBackendError, OutOfMemoryError):
            assert self.memory.mapped_bytes == before
        else:
            assert self.memory.mapped_bytes == self.memory.nbytes
            for number, found in self.ranges.items():
                if self.bytes[number] is None:
                    assert peek(found.address, 1) == (b"\0" if self.backend.zeroed else b"\xff")
                    poke(found.address, bytes([number]))
                    self.bytes[number] = number
        self.backend.faults.clear()

    @invariant()
    def memory_is_that_of_mapped_ranges(self):
        if not hasattr(self, "backend"):
            return
        assert self.backend.allocated_bytes == sum(it.mapped_bytes for it in self.ranges.values())
        for number, found in self.ranges.items():
            if found.mapped and self.bytes[number] is not None:
                assert peek(found.address, 1) == bytes([number])


Ranges.TestCase.settings = settings(max_examples=25, stateful_step_count=15)
test_ranges_of_any_history = Ranges.TestCase


@given(sizes=st.lists(st.integers(1, 3 * PART), min_size=1, max_size=5))
@settings(max_examples=20)
def test_sizes_are_rounded_to_whole_granules(sizes):
    memory = PrivateMemory(FakeBackend(), part_bytes=PART)
    ranges = [memory.allocate(size) for size in sizes]
    for size, found in zip(sizes, ranges, strict=True):
        assert size <= found.nbytes < size + memory.backend.granularity
