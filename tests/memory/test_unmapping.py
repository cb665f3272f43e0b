"""Nothing is unmapped while work may use it: wait, unmap, release, in this order, however a mapping ends.

The work is real: a thread that reads mapped memory. Where the order is wrong, the process ends with SIGSEGV.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import pytest
from support.hostmemory import peek, poke, run_child
from support.waiting import open_fds, wait_until

from shared_store.base.errors import MemoryBackendError
from shared_store.memory import Access, Mapping, unmapping
from shared_store.memory.fake import FakeBackend
from shared_store.memory.mapping import close_all, map_writable

MIB = 1 << 20


def segments_mapped():
    """Return the address ranges of segments that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {tuple(int(part, 16) for part in line.split()[0].split("-")) for line in lines if "memfd:wooly" in line}


@pytest.fixture
def left_mapped():
    """Unmap what the test leaves mapped on purpose: other tests of this process count the mapped segments."""
    before = segments_mapped()
    yield
    left = segments_mapped() - before
    assert left
    for start, end in left:
        assert ctypes.CDLL(None).munmap(ctypes.c_void_p(start), ctypes.c_size_t(end - start)) == 0


_WAYS = {
    "collected": "del mapping",
    "collected in a circle": "circle = [mapping]; circle.append(circle); del mapping, circle; gc.collect()",
    "collected in another thread": "passed = [mapping]; del mapping; run_in_thread(passed.clear)",
    "closed": "mapping.close()",
    "closed with others": "close_all([mapping])",
    "unmapped": "mapping.unmap()",
    "released": "mapping.release_segment()",
    "mapped with other rights": "mapping.map(Access.WRITE); mapping.unmap()",
}

_CHILD = """
import ctypes, gc, sys, threading, time
from shared_store.memory import Access, Mapping
from shared_store.memory.fake import FakeBackend
from shared_store.memory.mapping import close_all

def run_in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

backend = FakeBackend()
segment = backend.create(2 << 20)
with backend.export(segment) as fd:
    mapping = Mapping(backend, backend.import_fd(fd.fileno(), segment.nbytes))
mapping.map(Access.WRITE)
ctypes.memset(mapping.address, 7, mapping.nbytes)
mapping.map(Access.READ)
address, nbytes = mapping.address, mapping.nbytes
started, result = threading.Event(), []

def kernel():
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        total = sum(ctypes.string_at(address + at, 1)[0] for at in range(0, nbytes, 4096))
        started.set()
    result.append(total)

backend.calls.clear()
backend.launch(kernel)
started.wait()
{way}
print(result, backend.calls)
"""


@pytest.mark.parametrize("way", _WAYS)
def test_work_in_flight_ends_before_its_memory_is_unmapped(way):
    """Its result is right, and the segment is released last."""
    status, output = run_child(_CHILD.replace("{way}", _WAYS[way]))
    kept = way in {"unmapped", "mapped with other rights"}
    calls = ["settle", "unmap"] * (2 if way == "mapped with other rights" else 1) + ["release"] * (not kept)
    assert (status, output) == (0, f"{[7 * 512]} {calls}")


@pytest.fixture
def backend():
    """A device with work in flight."""
    made = FakeBackend()
    made.asynchronous = True
    yield made
    made.capturing = False
    unmapping.unmap_deferred()
    assert unmapping.deferred().waiting == 0


def mapped(backend):
    """A mapped segment with bytes in it. pytest would keep a fixture's value alive."""
    segment = backend.create(2 * MIB)
    made = Mapping(backend, segment)
    made.map(Access.WRITE)
    poke(made.address, b"bytes")
    return made


class Graph:
    """Stands for the object of a capture."""


@pytest.fixture
def capture():
    """A capture that has begun, and ends with the test."""
    graph = Graph()
    unmapping.captures.begin(graph)
    yield graph
    unmapping.captures.end(graph)


def test_a_mapping_that_is_collected_during_a_capture_is_unmapped_when_the_capture_ends(backend, capture):
    """Until then nothing waits for the device, and the bytes stay where captured work reads them."""
    mapping = mapped(backend)
    address, before = mapping.address, unmapping.deferred()
    backend.calls.clear()
    del mapping
    gc.collect()
    assert backend.calls == []
    assert peek(address, 5) == b"bytes"
    assert unmapping.deferred() == (1, 2 * MIB, before.total + 1)
    unmapping.captures.end(capture)
    assert backend.calls == ["settle", "unmap", "release"]
    assert unmapping.deferred() == (0, 0, before.total + 1)
    assert backend.allocated_bytes == 0


def test_closing_during_a_capture_is_deferred_and_final(backend, capture):
    mapping = mapped(backend)
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.map(Access.READ)
    assert backend.allocated_bytes == 2 * MIB
    unmapping.captures.end(capture)
    assert backend.allocated_bytes == 0


@pytest.mark.parametrize("call", ["unmap", "release_segment"])
def test_suspending_during_a_capture_is_refused_and_changes_nothing(backend, capture, call):
    """Its caller needs the memory to be gone afterwards."""
    mapping = mapped(backend)
    with pytest.raises(MemoryBackendError, match="while a CUDA graph is being captured; end the capture first"):
        getattr(mapping, call)()
    assert peek(mapping.address, 5) == b"bytes"
    assert mapping.access is Access.WRITE
    unmapping.captures.end(capture)
    getattr(mapping, call)()
    assert mapping.access is None
    mapping.close()


def test_the_end_of_one_of_two_captures_unmaps_nothing(backend, capture):
    mapping = mapped(backend)
    other = Graph()
    unmapping.captures.begin(other)
    del mapping
    unmapping.captures.end(capture)
    assert backend.allocated_bytes == 2 * MIB
    unmapping.captures.end(other)
    assert backend.allocated_bytes == 0


def test_a_capture_whose_graph_is_gone_is_over(backend):
    """A program that never ends its capture does not keep memory for good."""
    mapping = mapped(backend)
    graph = Graph()
    unmapping.captures.begin(graph)
    del mapping
    assert backend.allocated_bytes == 2 * MIB
    del graph
    gc.collect()
    unmapping.unmap_deferred()
    assert backend.allocated_bytes == 0


@pytest.mark.parametrize("moment", ["map", "unmap", "close", "collect"])
def test_deferred_memory_is_unmapped_with_the_next_mapping_or_unmapping(backend, moment):
    """Where the device alone knows of the capture, nobody tells when it ends."""
    mapping = mapped(backend)
    other, idle = mapped(backend), Mapping(backend, backend.create(2 * MIB))
    backend.capturing = True
    del mapping
    assert unmapping.deferred().waiting == 1
    backend.capturing = False
    if moment == "map":
        idle.map(Access.READ)
    elif moment == "unmap":
        other.unmap()
    elif moment == "close":
        other.close()
    else:
        del other
    assert unmapping.deferred().waiting == 0
    idle.close()


def test_deferred_memory_is_unmapped_without_another_call(backend):
    mapping = mapped(backend)
    backend.capturing = True
    del mapping
    backend.capturing = False
    wait_until(lambda: backend.allocated_bytes == 0, "the deferred memory to be unmapped")


@pytest.mark.usefixtures("capture")
def test_host_memory_is_unmapped_during_a_capture():
    """No kernel uses it, and nothing waits for the device."""
    fds = open_fds()
    backend = FakeBackend()
    mapping = mapped(backend)
    assert open_fds() == fds + 1
    del mapping
    assert open_fds() == fds


def waiting_for_a_device():
    """True while another thread waits for a device."""
    free = unmapping.captures.lock.acquire(blocking=False)
    if free:
        unmapping.captures.lock.release()
    return not free


def test_no_capture_begins_while_a_device_is_waited_for(backend):
    """Waiting would invalidate it."""
    mapping = mapped(backend)
    end, waiting, order = threading.Event(), threading.Event(), []

    def kernel():
        waiting.set()
        end.wait()
        order.append("work ended")

    def capture():
        unmapping.captures.begin(graph)
        order.append("capture began")

    graph = Graph()
    backend.launch(kernel)
    waiting.wait()
    closing = threading.Thread(target=mapping.close)
    closing.start()
    wait_until(waiting_for_a_device, "the wait for the device to begin")
    beginning = threading.Thread(target=capture)
    beginning.start()
    end.set()
    closing.join()
    beginning.join()
    unmapping.captures.end(graph)
    assert order == ["work ended", "capture began"]


def test_the_collector_does_not_wait_for_a_thread_that_waits_for_a_device(backend):
    """That thread may be waiting for the one that the collector interrupts: here it is the work itself."""
    collected, closed = mapped(backend), mapped(backend)

    first = threading.Event()

    def work():
        nonlocal collected
        first.wait()
        del collected

    backend.launch(work)
    closing = threading.Thread(target=closed.close)
    closing.start()
    wait_until(waiting_for_a_device, "the wait for the device to begin")
    first.set()
    closing.join(10)
    assert not closing.is_alive()
    wait_until(lambda: backend.allocated_bytes == 0, "the deferred memory to be unmapped")


@pytest.mark.usefixtures("left_mapped")
def test_a_range_that_cannot_be_unmapped_is_never_used_again(backend):
    """Its segment is released nevertheless, and the error is the caller's."""
    mapping = mapped(backend)
    backend.faults.fail_at("unmap", 1)
    with pytest.raises(MemoryBackendError, match="failed as planned"):
        mapping.close()
    assert backend.calls[-1] == "release"
    assert backend.allocated_bytes == 2 * MIB  # the range is still mapped
    assert mapping.address not in {backend.reserve(2 * MIB) for _ in range(50)}


@pytest.mark.usefixtures("left_mapped")
def test_a_deferred_range_that_cannot_be_unmapped_is_logged(backend, capture, caplog):
    mapping = mapped(backend)
    del mapping
    backend.faults.fail_at("unmap", 1)
    unmapping.captures.end(capture)
    assert "cannot unmap 2097152 bytes of a device" in caplog.text
    assert unmapping.deferred().waiting == 0


def test_a_forked_child_leaves_the_parents_device_alone(backend):
    """The driver is the parent's; a capture of the parent is none of the child."""
    mapping = mapped(backend)
    graph = Graph()
    unmapping.captures.begin(graph)
    backend.calls.clear()
    child = os.fork()
    if not child:
        try:
            del mapping
            os._exit(0 if not backend.calls and not unmapping.captures.active else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    unmapping.captures.end(graph)
    assert os.waitstatus_to_exitcode(status) == 0
    assert peek(mapping.address, 5) == b"bytes"
    mapping.close()


def test_map_writable_waits_for_copies_that_are_in_flight(backend):
    """A block that fails leaves copies in flight."""
    segment, done = backend.create(2 * MIB), []

    def fail():
        with map_writable(backend, backend.export(segment), segment.nbytes) as address:
            backend.launch(lambda: done.append(peek(address, 5)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert done == [bytes(5)]
    backend.release(segment)


@pytest.mark.usefixtures("left_mapped")
def test_close_all_closes_the_rest_after_an_error(backend):
    mappings = [mapped(backend) for _ in range(3)]
    backend.faults.fail_at("unmap", 2)
    with pytest.raises(MemoryBackendError):
        close_all(mappings)
    assert backend.calls.count("release") == 3
    assert backend.allocated_bytes == 2 * MIB  # the range is still mapped
