"""The promises of every backend: one suite, run on each of them."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from support.hostmemory import mapped_ranges, peek, poke, run_child
from support.waiting import open_fds

from shared_store.base.errors import MemoryBackendError
from shared_store.memory import Access, Mapping

MIB = 1 << 20


def test_every_mapping_of_a_segment_sees_the_bytes_of_its_publisher(segment, imported, capable):
    capable("host_access")
    writer, early_reader = imported(segment, Access.WRITE), imported(segment, Access.READ)
    poke(writer.address, b"written")
    late_reader = imported(segment, Access.READ)
    assert peek(early_reader.address, 7) == peek(late_reader.address, 7) == b"written"
    assert len({writer.address, early_reader.address, late_reader.address}) == 3


def test_the_last_byte_of_a_segment_is_mapped(segment, imported, capable):
    capable("host_access")
    writer = imported(segment, Access.WRITE)
    poke(writer.address + segment.nbytes - 1, b"!")
    assert peek(imported(segment, Access.READ).address + segment.nbytes - 1, 1) == b"!"


def test_a_publisher_maps_for_reading_at_the_address_that_it_wrote_at(backend, segment, imported, capable):
    capable("host_access")
    mapping = imported(segment, Access.WRITE)
    address = mapping.address
    poke(address, b"written")
    mapping.unmap()
    backend.seal(segment)
    mapping.map(Access.READ)
    assert mapping.address == address
    assert peek(address, 7) == b"written"


def test_a_suspended_mapping_keeps_its_address_range_reserved(backend, segment, write, capable):
    """A hundred other reservations of the same size do not get the range."""
    capable("host_access")
    mapping = write(segment, b"kept")
    others = [backend.reserve(segment.nbytes) for _ in range(100)]
    taken = range(mapping.address, mapping.address + mapping.nbytes)
    assert not any(other in taken or other + segment.nbytes - 1 in taken for other in others)
    for other in others:
        backend.unreserve(other, segment.nbytes)
    for _ in range(3):
        mapping.map(Access.READ)
        assert peek(mapping.address, 4) == b"kept"
        mapping.unmap()


def test_suspended_memory_faults(capable):
    """Reading it ends the process, instead of returning bytes of something else."""
    capable("host_access")
    program = """
import ctypes, sys
from shared_store.memory import Access, Mapping, MemfdBackend
backend = MemfdBackend()
mapping = Mapping(backend, backend.create(1 << 21))
mapping.map(Access.READ)
ctypes.string_at(mapping.address, 1)
mapping.unmap()
print("suspended", flush=True)
ctypes.string_at(mapping.address, 1)
"""
    status, output = run_child(program)
    assert (status, output) == (-signal.SIGSEGV, "suspended")


def test_seal_is_refused_while_the_segment_is_mapped_for_writing_and_can_be_repeated(
    backend, segment, imported, capable
):
    capable("seals")
    writer = imported(segment, Access.WRITE)
    with pytest.raises(MemoryBackendError, match="still mapped for writing; unmap it"):
        backend.seal(segment)
    writer.unmap()
    backend.seal(segment)


def test_sealing_is_idempotent(backend, segment):
    """A commit that failed at its second segment seals the first one again when it is repeated."""
    backend.seal(segment)
    backend.seal(segment)


def test_sealed_memory_is_not_mapped_for_writing(backend, segment, imported, capable):
    capable("seals")
    backend.seal(segment)
    with pytest.raises(MemoryBackendError, match="mmap"):
        imported(segment, Access.WRITE)


_ATTACKS = {
    "write": "os.pwrite(fd, b'x', 0)",
    "truncate": "os.ftruncate(fd, 0)",
    "grow": "os.ftruncate(fd, 1 << 30)",
    "punch a hole": (
        "ctypes.CDLL(None, use_errno=True).fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)) and fail()"
    ),
    "map writable": "mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)",
    "make a readable mapping writable": (
        "ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(shared_mapping(fd)), 4096, 3) and fail()"
    ),
    "reopen by its path and write": "os.pwrite(os.open(f'/proc/self/fd/{fd}', os.O_RDWR), b'x', 0)",
    "remove the seals": "fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)",
}


@pytest.mark.parametrize("attack", _ATTACKS)
def test_no_process_can_change_sealed_memory(backend, segment, write, capable, attack):
    capable("seals")
    write(segment, b"published")
    backend.seal(segment)
    fd = backend.export(segment)
    program = f"""
import ctypes, fcntl, mmap, os, sys
def fail():
    raise OSError(ctypes.get_errno(), "refused")
def shared_mapping(fd):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    return libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0))
fd = int(sys.argv[1])
try:
    {_ATTACKS[attack]}
except OSError as error:
    print("refused", error.errno)
else:
    print("done")
"""
    with fd:
        status, output = run_child(program, fd.fileno(), pass_fds=(fd.fileno(),))
        assert status == 0
        assert output in {"refused 1", "refused 13"}, output  # EPERM, EACCES
        assert os.fstat(fd.fileno()).st_size == segment.nbytes
        assert os.pread(fd.fileno(), 9, 0) == b"published"


def test_a_write_of_a_reader_stays_private_and_is_counted(backend, segment, write, imported, capable):
    capable("copy_on_write")
    write(segment, b"shared")
    backend.seal(segment)
    one, other = imported(segment, Access.READ), imported(segment, Access.READ)
    assert one.private_bytes() == other.private_bytes() == 0
    poke(one.address, b"MINE!!")
    poke(one.address + MIB, b"x")
    assert peek(one.address, 6) == b"MINE!!"
    assert peek(other.address, 6) == peek(imported(segment, Access.READ).address, 6) == b"shared"
    assert one.private_bytes() == 2 * os.sysconf("SC_PAGE_SIZE")
    assert other.private_bytes() == 0


def test_reading_makes_no_private_pages(segment, imported, capable):
    capable("copy_on_write")
    mapping = imported(segment, Access.READ)
    peek(mapping.address, segment.nbytes)
    assert mapping.private_bytes() == 0


def test_suspending_drops_private_pages(backend, segment, write, capable):
    """The segment's bytes are mapped again, without the writes of this process."""
    capable("copy_on_write")
    mapping = write(segment, b"shared")
    backend.seal(segment)
    mapping.map(Access.READ)
    poke(mapping.address, b"MINE!!")
    mapping.unmap()
    assert mapping.private_bytes() == 0
    mapping.map(Access.READ)
    assert peek(mapping.address, 6) == b"shared"
    assert mapping.private_bytes() == 0


@pytest.mark.parametrize("what", ["regular file", "pipe", "socket", "closed"])
def test_a_descriptor_of_anything_else_is_refused(backend, tmp_path, what):
    import socket

    if what == "regular file":
        (tmp_path / "file").write_bytes(bytes(4096))
        fds = [os.open(tmp_path / "file", os.O_RDWR)]
    elif what == "pipe":
        fds = list(os.pipe())
    elif what == "socket":
        pair = socket.socketpair()
        fds = [one.detach() for one in pair]
    else:
        fds = []
    try:
        with pytest.raises(MemoryBackendError, match="is not a segment"):
            backend.import_fd(fds[0] if fds else 999_999, 4096)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_segment_smaller_than_announced_is_refused(backend, segment, capable):
    """Otherwise an engine would fault in the middle of a forward pass."""
    capable("sized_fds")
    fd = backend.export(segment)
    before = open_fds()
    with pytest.raises(MemoryBackendError, match=f"{segment.nbytes} bytes, where {segment.nbytes + 1} were announced"):
        backend.import_fd(fd.fileno(), segment.nbytes + 1)
    assert open_fds() == before
    fd.close()


def test_exported_descriptors_are_not_inherited(backend, segment):
    with backend.export(segment) as fd:
        assert not os.get_inheritable(fd.fileno())


def test_release_is_idempotent_and_does_not_unmap(backend, kind, capable):
    capable("host_access")
    segment = backend.create(2 * MIB)
    with backend.export(segment) as fd:
        mapping = Mapping(backend, backend.import_fd(fd.fileno(), 2 * MIB))
    mapping.map(Access.WRITE)
    before = open_fds()
    backend.release(segment)
    backend.release(segment)
    assert open_fds() == before - kind.fd_backed
    assert segment.released
    poke(mapping.address, b"alive")
    assert peek(mapping.address, 5) == b"alive"
    mapping.close()


def test_closing_a_mapping_is_idempotent_and_final(segment, imported):
    mapping = imported(segment, Access.READ)
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.map(Access.READ)


def test_a_mapping_releases_its_segment_and_maps_another_at_the_same_address(backend, kind, segment, imported, capable):
    """In between, the range stays reserved and no memory is behind it."""
    capable("host_access")
    mapping = imported(segment, Access.WRITE)
    address = mapping.address
    poke(address, b"first")
    before = open_fds()
    mapping.release_segment()
    mapping.release_segment()
    assert (mapping.access, mapping.address) == (None, address)
    assert open_fds() == before - 1
    with pytest.raises(ValueError, match="has no segment"):
        mapping.map(Access.READ)
    other = backend.create(segment.nbytes)
    with backend.export(other) as fd:
        smaller = backend.import_fd(fd.fileno(), 1) if kind.fd_backed else type(segment)(None, 1, None)
        with pytest.raises(ValueError, match="another size"):
            mapping.set_segment(smaller)
        if kind.fd_backed:
            backend.release(smaller)
        mapping.set_segment(backend.import_fd(fd.fileno(), segment.nbytes))
    mapping.map(Access.WRITE)
    poke(address, b"other")
    mapping.map(Access.READ)
    assert peek(address, 5) == b"other"
    with pytest.raises(ValueError, match="has a segment"):
        mapping.set_segment(other)
    mapping.close()
    backend.release(other)


def test_a_mapping_without_a_segment_closes(segment, imported):
    mapping = imported(segment, Access.READ)
    mapping.release_segment()
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.map(Access.READ)


def test_a_mapping_without_references_is_closed(backend, segment, capable):
    capable("fd_backed")  # the driver maps ranges of its own
    gc.collect()
    fds, ranges = open_fds(), mapped_ranges()
    with backend.export(segment) as fd:
        mapping = Mapping(backend, backend.import_fd(fd.fileno(), segment.nbytes))
    mapping.map(Access.READ)
    assert open_fds() == fds + 1
    assert mapped_ranges() > ranges
    del mapping
    assert open_fds() == fds
    assert mapped_ranges() <= ranges


def test_two_hundred_rounds_leak_neither_descriptors_nor_address_space(backend, capable):
    """Create, export, import, write, seal, suspend, resume, close."""
    capable("host_access")

    def one_round(number):
        segment = backend.create(2 * MIB)
        with backend.export(segment) as fd:
            mapping = Mapping(backend, backend.import_fd(fd.fileno(), 2 * MIB))
        mapping.map(Access.WRITE)
        poke(mapping.address, b"%8d" % number)
        mapping.unmap()
        backend.seal(segment)
        mapping.map(Access.READ)
        assert peek(mapping.address, 8) == b"%8d" % number
        mapping.unmap()
        mapping.map(Access.READ)
        mapping.close()
        backend.release(segment)

    one_round(0)  # libraries and the interpreter's arenas are loaded now
    gc.collect()
    fds, ranges = open_fds(), mapped_ranges()
    for number in range(200):
        one_round(number)
    gc.collect()
    assert open_fds() == fds
    assert mapped_ranges() <= ranges + 2  # the interpreter may map an arena or two


def test_a_failed_map_leaves_the_range_reserved(backend, segment, imported, capable):
    """A sealed segment cannot be mapped for writing. The mapping is unchanged and can be mapped for reading."""
    capable("seals")
    backend.seal(segment)
    mapping = imported(segment)
    with pytest.raises(MemoryBackendError):
        mapping.map(Access.WRITE)
    mapping.map(Access.READ)
    assert mapping.access is Access.READ
    mapping.unmap()
    assert mapping.access is None
