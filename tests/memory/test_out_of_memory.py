"""Allocation failures, and memory that is freed again."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys

import pytest
from support.hostmemory import shared_memory_bytes
from support.waiting import open_fds, wait_until

from shared_store.base.errors import MemoryBackendError, OutOfMemoryError
from shared_store.memory import MemfdBackend
from shared_store.memory.fake import FakeBackend

MIB = 1 << 20


def test_out_of_memory_is_typed_has_the_numbers_and_leaks_nothing(backend):
    before = open_fds()
    free = backend.free_bytes()
    with pytest.raises(OutOfMemoryError) as caught:
        backend.create(1 << 50)
    assert open_fds() == before
    text = str(caught.value)
    assert str(1 << 50) in text
    said = int(re.search(r"(\d+) bytes are free", text)[1])
    assert abs(said - free) < 512 * MIB, text
    segment = backend.create(2 * MIB)  # the failure allocated nothing
    backend.release(segment)


def test_pages_are_allocated_when_a_segment_is_created():
    """A full machine refuses a new segment, instead of killing a process that touches an old one."""
    backend = MemfdBackend()
    segment = backend.create(64 * MIB)
    try:
        assert os.fstat(segment.fd.fileno()).st_blocks * 512 == 64 * MIB
    finally:
        backend.release(segment)


def test_memory_is_freed_when_the_last_process_with_a_descriptor_is_killed():
    """The creator released it. A child with a descriptor and a mapping has the memory until it is killed."""
    backend = MemfdBackend()
    nbytes = 1536 * MIB  # much more than the stores of other tests allocate and free meanwhile
    before = shared_memory_bytes()
    segment = backend.create(nbytes)
    fd = backend.export(segment)
    program = """
import sys
from shared_store.memory import Access, Mapping, MemfdBackend
backend = MemfdBackend()
mapping = Mapping(backend, backend.import_fd(int(sys.argv[1]), int(sys.argv[2])))
mapping.map(Access.READ)
print("mapped", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(fd.fileno()), str(nbytes)],
        pass_fds=(fd.fileno(),),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout.readline() == b"mapped\n"
        fd.close()
        backend.release(segment)
        assert shared_memory_bytes() - before > nbytes * 3 // 4
        child.kill()
        child.wait()
        wait_until(lambda: shared_memory_bytes() - before < nbytes // 4, "the memory to be free")
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_the_limit_of_open_files_is_a_typed_error():
    """When creating, exporting and importing segments."""
    backend = MemfdBackend()
    segment = backend.create(MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fd = backend.export(segment)
    calls = {
        "create": lambda: backend.create(MIB),
        "export": lambda: backend.export(segment),
        "import": lambda: backend.import_fd(fd.fileno(), MIB),
    }
    backend.free_bytes()  # opens files of its own
    caught = {}
    spare = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_fds() + 8, hard))
        while True:
            try:
                spare.append(os.dup(0))
            except OSError:
                break
        for name, call in calls.items():
            if name == "create":
                backend._available = lambda: 1 << 40
            try:
                call()
            except MemoryBackendError as error:
                caught[name] = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in spare:
            os.close(one)
        fd.close()
        backend.release(segment)
    assert set(caught) == set(calls)
    assert all("ulimit -n" in text for text in caught.values()), caught


def test_the_fake_backend_has_a_capacity():
    backend = FakeBackend(capacity=3 * MIB)
    one = backend.create(2 * MIB)
    with pytest.raises(OutOfMemoryError, match=f"{MIB} bytes are free"):
        backend.create(2 * MIB)
    assert backend.allocated_bytes == 2 * MIB
    assert backend.free_bytes() == MIB
    backend.release(one)
    backend.release(one)
    assert backend.allocated_bytes == 0
    backend.release(backend.create(3 * MIB))


def test_the_fake_backend_fails_only_as_planned():
    backend = FakeBackend()
    backend.faults.fail_at("create", 2)
    one = backend.create(MIB)
    with pytest.raises(MemoryBackendError, match="as planned"):
        backend.create(MIB)
    two = backend.create(MIB)
    assert backend.allocated_bytes == 2 * MIB
    backend.faults.fail_at("seal", 1)
    with pytest.raises(MemoryBackendError, match="as planned"):
        backend.seal(one)
    backend.seal(one)
    backend.release(one)
    backend.release(two)
    assert backend.allocated_bytes == 0
