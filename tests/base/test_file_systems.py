"""Real file systems: on which of them a file is recognized by its inode and times."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from support.filesystems import ObjectStore, SmallDisk, may_mount, may_mount_fuse

from shared_store.base import file_systems
from shared_store.base.checkpoint import file_id, hash_files, why_unrecognized
from shared_store.base.errors import CheckpointError

needs_mount = pytest.mark.skipif(not may_mount(), reason="needs to mount file systems, so root")
needs_fuse = pytest.mark.skipif(not may_mount_fuse(), reason="needs to mount FUSE file systems: root, and /dev/fuse")


@pytest.fixture
def objects(tmp_path):
    """Return an object store behind FUSE with one file."""
    made = ObjectStore(tmp_path)
    (made.backing / "weights").write_bytes(b"a" * 100_000)
    yield made
    made.unmount()


@pytest.fixture
def overlay(tmp_path):
    """Return a function that mounts an overlay over a directory, and returns its path."""
    mounted = []

    def mount(lower):
        place, above = tmp_path / "overlay", tmp_path / "above"
        place.mkdir()
        above.mkdir()
        SmallDisk(above)  # in memory, because the directory of tests may be on an overlay itself
        mounted.append(above)
        (above / "upper").mkdir()
        (above / "work").mkdir()
        layers = f"lowerdir={lower},upperdir={above}/upper,workdir={above}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "none", str(place)], check=True)
        mounted.append(place)
        return place

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@needs_mount
def test_files_in_memory_are_recognized(tmp_path):
    disk = SmallDisk(tmp_path)
    try:
        (tmp_path / "weights").write_bytes(b"a")
        assert file_systems.type_of(tmp_path / "weights") == 0x01021994
        assert why_unrecognized(tmp_path / "weights") == ""
    finally:
        disk.unmount()


def test_a_file_system_that_is_not_known_is_not_trusted():
    """Its number is in the reason."""
    assert why_unrecognized(Path("/proc/cpuinfo")) == (
        "the times of files on a file system of type 0x9fa0 may be made up"
    )


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*absent: No such file"):
        why_unrecognized(tmp_path / "absent")


@needs_fuse
def test_a_file_behind_fuse_is_not_recognized(objects):
    """Its bytes change, and its identity does not: it is settled long since, but its digest may not be cached."""
    file = objects.mounted / "weights"
    before = file_id(file)
    (first,) = hash_files([file])
    (objects.backing / "weights").write_bytes(b"b" * 100_000)
    (second,) = hash_files([file])
    assert file_id(file) == before
    assert before.settled
    assert first.digest != second.digest
    assert not first.settled
    assert why_unrecognized(file) == "the times of files on FUSE may be made up"


@needs_fuse
def test_a_directory_that_the_user_trusts(objects, monkeypatch, tmp_path):
    """Also where a link leads there; other directories are not trusted."""
    file, link = objects.mounted / "weights", tmp_path / "link"
    link.symlink_to(file)
    monkeypatch.setenv("WOOLY_TRUSTED_DIRECTORIES", f"/srv{os.pathsep}{objects.mounted}")
    assert [why_unrecognized(path) for path in (file, link)] == ["", ""]
    assert hash_files([file])[0].settled
    monkeypatch.setenv("WOOLY_TRUSTED_DIRECTORIES", str(objects.backing))
    assert "FUSE" in why_unrecognized(link)


@needs_mount
def test_a_file_of_an_unpacked_image_is_recognized(overlay, tmp_path):
    """Its ctime is that of the unpacking. So is a file that was written in the container."""
    lower = tmp_path / "layer"
    lower.mkdir()
    (lower / "weights").write_bytes(b"a")
    os.utime(lower / "weights", (time.time() - 3600,) * 2)
    place = overlay(lower)
    (place / "new").write_bytes(b"b")
    assert file_systems.type_of(place / "weights") == 0x794C7630
    assert [why_unrecognized(place / name) for name in ("weights", "new")] == ["", ""]


@needs_fuse
def test_a_file_of_an_image_with_times_of_its_own_is_not_recognized(objects, overlay):
    """An overlay shows the times of the layer below, here a constant. It is unmounted first, so it is made last."""
    place = overlay(objects.mounted)
    assert file_systems.type_of(place / "weights") == 0x794C7630
    assert why_unrecognized(place / "weights") == "its times may be those of an image"


def test_a_file_is_opened_where_its_server_is_asked_then(tmp_path, monkeypatch):
    """As on NFS, here with the type of this directory. Links are followed, and the identity is the same."""
    (tmp_path / "weights").write_bytes(b"a")
    (tmp_path / "link").symlink_to("weights")
    plain, opened = file_id(tmp_path / "link"), []
    monkeypatch.setattr(file_systems, "_NFS", file_systems.type_of(tmp_path))
    stock = os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments[0]) or stock(*arguments))
    assert file_id(tmp_path / "link") == plain
    assert opened == [tmp_path / "link"]
    with pytest.raises(CheckpointError, match="cannot read"):
        file_id(tmp_path / "absent")
