"""Digests, checkpoint files, errors and environment variables."""

from __future__ import annotations

import ctypes
import os

import pytest

from shared_store.base import envs, errors
from shared_store.base.checkpoint import SETTLED_S, hash_files
from shared_store.base.digest import SIZE, digest, digest_at

# From https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json: input byte i is i % 251.
VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
}


@pytest.mark.parametrize("length", VECTORS)
def test_digests_are_blake3(length):
    data = bytes(index % 251 for index in range(length))
    assert digest(data).hex() == VECTORS[length]
    assert len(digest(data)) == SIZE


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_digest_is_the_same_for_bytes_a_view_and_an_address(length):
    """From bytes, a view and an address; with one thread below 1 MiB and all cores above."""
    data = bytearray(os.urandom(length))
    buffer = (ctypes.c_char * max(length, 1)).from_buffer_copy(bytes(data) or b"\0")
    assert (
        digest(data) == digest(memoryview(data)) == digest(bytes(data)) == digest_at(ctypes.addressof(buffer), length)
    )


def test_a_digest_of_a_view_with_another_item_type_is_that_of_its_bytes():
    assert digest(memoryview(bytes(range(64))).cast("I")) == digest(bytes(range(64)))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))

    def change(_):
        path.write_bytes(bytes(1001))

    with pytest.raises(errors.CheckpointError, match="changed while it was being read"):
        hash_files([path], progress=change)


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, what):
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    with pytest.raises(errors.CheckpointError, match=f"cannot read .*{what}"):
        hash_files([path])


def test_only_files_that_are_old_enough_may_be_cached(tmp_path):
    """`mtime` alone does not decide, because any program can set it; `ctime` is set by the kernel."""
    path = tmp_path / "weights"
    path.write_bytes(b"new")
    os.utime(path, (0, 0))
    (young,) = hash_files([path])
    assert not young.settled
    aged = young.file.__class__(*(getattr(young.file, name) for name in ("device", "inode", "size")), 0, 0)
    assert aged.settled
    assert SETTLED_S >= 1


def all_errors(cls=errors.WoolyError):
    return [cls, *(found for direct in cls.__subclasses__() for found in all_errors(direct))]


def test_every_error_is_found_by_its_own_code():
    codes = [cls.code for cls in all_errors()]
    assert len(set(codes)) == len(codes)
    assert all(errors.by_code(cls.code) is cls for cls in all_errors())
    assert errors.by_code("from a later version") is errors.WoolyError


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.code)
def test_every_error_has_a_meaning_and_a_failing_exit_code(cls):
    assert cls.__doc__
    assert 1 <= cls.exit_code < 125


def test_an_invalid_variable_is_named(monkeypatch):
    monkeypatch.setenv("WOOLY_AUTOSTART", "perhaps")
    with pytest.raises(errors.ConfigError, match="WOOLY_AUTOSTART='perhaps': use 1 or 0"):
        envs.AUTOSTART.get()
    monkeypatch.setenv("WOOLY_AUTOSTART", "")
    assert envs.AUTOSTART.get() is True


def test_the_default_directory_belongs_to_the_user(monkeypatch):
    monkeypatch.delenv("WOOLY_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert str(envs.RUNTIME_DIR.get()) == "/run/user/7/wooly"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(envs.RUNTIME_DIR.get()).endswith(f"wooly-{os.getuid()}")
