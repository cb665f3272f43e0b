"""Copies of memory that left its device: in an arena, and in swap files whose bytes are checked."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.filesystems import SmallDisk, may_mount
from support.groups import MemoryGroup
from support.mapped import flags_at
from support.programs import finish_program, start_program
from support.waiting import open_fds

from shared_store.base.errors import ConfigError, DigestMismatchError, DiskError, MemoryBackendError, OutOfMemoryError
from shared_store.private import arena as arenas
from shared_store.private.arena import Arena
from shared_store.private.copies import FileCopy, HostCopy
from shared_store.runtime import swap_files

EXTENT = 1 << 20


def fill(copy, pieces):
    for piece in pieces:
        copy.append(len(piece))[:] = piece
        copy.wrote()


def contents(copy, count):
    copy.rewind()
    return [bytes(copy.next()) for _ in range(count)]


@pytest.fixture(params=["host", "file"])
def copy(request, tmp_path):
    made = HostCopy(Arena(extent_bytes=EXTENT)) if request.param == "host" else FileCopy(tmp_path, EXTENT)
    yield made
    made.close()


PIECES = st.lists(st.binary(min_size=1, max_size=EXTENT // 3), min_size=1, max_size=8)


@given(pieces=PIECES)
@settings(max_examples=30)
def test_a_copy_returns_its_pieces_as_often_as_needed(tmp_path_factory, pieces):
    directory = tmp_path_factory.getbasetemp()
    for copy in (HostCopy(Arena(extent_bytes=EXTENT)), FileCopy(directory, sum(map(len, pieces)))):
        fill(copy, pieces)
        assert copy.nbytes == sum(map(len, pieces))
        assert contents(copy, len(pieces)) == contents(copy, len(pieces)) == pieces
        copy.close()


def test_a_closed_copy_leaves_no_descriptor(copy):
    before = open_fds()
    fill(copy, [b"some bytes"])
    copy.close()
    copy.close()
    assert open_fds() <= before


def test_an_arena_is_reused_and_shrinks_on_demand():
    arena = Arena(extent_bytes=EXTENT)
    for _ in range(3):
        copy = HostCopy(arena)
        fill(copy, [bytes(EXTENT // 2)] * 5)
        assert arena.nbytes == 3 * EXTENT
        copy.close()
    arena.shrink(EXTENT)
    assert arena.nbytes == EXTENT
    arena.close()
    assert arena.nbytes == 0


def test_pieces_of_an_arena_stay_where_they_are_while_others_follow():
    copy = HostCopy(Arena(extent_bytes=EXTENT))
    first = copy.append(8)
    for _ in range(4):
        copy.append(EXTENT)
    first[:] = b"in place"
    copy.rewind()
    assert bytes(copy.next()) == b"in place"


def test_an_arena_larger_than_free_memory_is_refused():
    arena = Arena(extent_bytes=EXTENT)
    arena.grow(EXTENT)
    with pytest.raises(OutOfMemoryError, match="do not fit into host memory"):
        arena.grow(1 << 50)
    assert arena.nbytes == EXTENT


def test_an_arena_is_left_out_of_core_dumps_and_children():
    arena = Arena(extent_bytes=EXTENT)
    piece, _ = arena.part(8, (0, 0))
    assert {"dd", "dc"} <= set(flags_at(ctypes.addressof(ctypes.c_char.from_buffer(piece))))


class Refusing:
    """A driver that registers the first extents only."""

    def __init__(self, most):
        self.registered = []
        self.most = most

    def register(self, address, nbytes):
        if len(self.registered) == self.most:
            raise MemoryBackendError(f"cuMemHostRegister: cannot register {nbytes} bytes")
        self.registered.append(address)

    def unregister(self, address):
        self.registered.remove(address)


def test_memory_is_pinned_as_far_as_the_driver_allows_and_unpinned_before_it_is_freed():
    pinning = Refusing(most=2)
    arena = Arena(pinning, extent_bytes=EXTENT)
    for _ in range(3):
        arena.grow(arena.nbytes + EXTENT)
    assert (arena.nbytes, len(pinning.registered)) == (3 * EXTENT, 2)
    arena.close()
    assert pinning.registered == []


def test_a_swap_file_has_no_name_and_is_its_owners_alone(tmp_path):
    with swap_files.create(tmp_path, 4096) as fd:
        found = os.fstat(fd.fileno())
        assert (found.st_nlink, found.st_mode & 0o777, found.st_blocks * 512 >= 4096) == (0, 0o600, True)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(OSError):  # noqa: PT011 - ENOENT or EINVAL, by file system
            os.link(f"/proc/self/fd/{fd.fileno()}", tmp_path / "name", follow_symlinks=True)


@pytest.mark.parametrize("offset", [0, 10, 40, 99])
def test_changed_bytes_are_refused(tmp_path, offset):
    copy = FileCopy(tmp_path, 100)
    fill(copy, [b"a" * 50, b"b" * 50])
    (changed,) = os.pread(copy._fd.fileno(), 1, offset)
    os.pwrite(copy._fd.fileno(), bytes([changed ^ 1]), offset)
    with pytest.raises(DigestMismatchError, match="other bytes than were written"):
        contents(copy, 2)
    copy.close()


def test_a_truncated_file_is_refused(tmp_path):
    copy = FileCopy(tmp_path, 100)
    fill(copy, [b"a" * 50, b"b" * 50])
    os.ftruncate(copy._fd.fileno(), 60)
    with pytest.raises(DigestMismatchError):
        contents(copy, 2)
    copy.close()


@pytest.mark.skipif(not may_mount(), reason="may not mount file systems")
def test_a_full_disk_refuses_a_copy_before_a_byte_is_written(tmp_path):
    disk = SmallDisk(tmp_path)
    before = open_fds()
    try:
        with pytest.raises(DiskError, match="free disk space"):
            FileCopy(tmp_path, 2 << 20)
        assert open_fds() == before
        FileCopy(tmp_path, 100 << 10).close()
    finally:
        disk.unmount()


def test_a_swap_directory_that_is_configured_may_be_anywhere_and_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("WOOLY_SWAP_DIR", str(tmp_path))
    assert swap_files.directory() == tmp_path
    assert swap_files.directory(tmp_path / "..") == tmp_path / ".."
    assert swap_files.free_bytes(tmp_path) > 0
    with pytest.raises(ConfigError, match="set WOOLY_SWAP_DIR"):
        swap_files.directory(tmp_path / "absent")


def test_default_swap_directory_is_refused_in_memory(monkeypatch):
    monkeypatch.delenv("WOOLY_SWAP_DIR", raising=False)
    assert swap_files.directory() == Path("/var/tmp")
    monkeypatch.setattr(swap_files, "DEFAULT_DIRECTORY", Path("/dev/shm"))
    with pytest.raises(ConfigError, match="is in memory"):
        swap_files.directory()


def test_copies_obey_the_control_group_of_their_process():
    """Its limit would kill the process, where the arena refuses."""
    group = MemoryGroup()
    child = start_program(
        """
from shared_store.base.errors import OutOfMemoryError
from shared_store.private.arena import Arena, host_room
input()
print(host_room())
try:
    Arena().grow(512 << 20)
except OutOfMemoryError as error:
    print(error.code)
arena = Arena()
arena.grow(256 << 20)
print(arena.nbytes, host_room())
""",
        stdin=subprocess.PIPE,
    )
    try:
        group.limit(900 << 20)
        group.add(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        room, code, rest = finish_program(child).splitlines()
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        group.remove()
    assert 256 << 20 < int(room) <= (900 << 20) - arenas.HEADROOM
    assert code == "out_of_memory"
    assert rest.split()[0] == str(256 << 20)


def test_a_file_that_may_not_grow_is_refused(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DiskError):
            FileCopy(tmp_path, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
