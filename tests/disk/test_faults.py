"""Saves and restores that fail or are killed: nothing partial is left behind, and the next one succeeds."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from disk.conftest import MANIFEST
from support.content import key
from support.waiting import wait_until

from shared_store.base.errors import DiskError
from shared_store.disk.save import save_resident
from shared_store.transfer.resident import committed

LARGE = 200 << 20


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 4 MiB; skip without the right to."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_disk_full(wooly, model, small_disk, session):
    """The error is `disk`, the file system is empty again, and no reader is left."""
    done = wooly("save", model.key, "--to", small_disk / "saved")
    assert (done.returncode, done.stdout) == (20, "")
    assert "No space left on device" in done.stderr
    assert done.stderr.endswith("[disk]\n")
    assert list(small_disk.iterdir()) == []
    assert os.statvfs(small_disk).f_bfree == os.statvfs(small_disk).f_blocks
    assert session.status().models[0].readers == 0


def test_read_only_file_system(session, model, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DiskError, match="Read-only file system"):
        save_resident(session, committed(session.status().models, model.key), small_disk / "saved")


def unfinished(directory):
    """Return the staging directories in a directory."""
    return [path for path in directory.iterdir() if ".unfinished-" in path.name]


def test_killed_while_saving(wooly, store, session, tmp_path):
    """The target does not exist; the next save removes the leftovers and is complete."""
    store.client().publish(key(1), [[1, LARGE]])
    target = tmp_path / "saved"
    process = wooly.start("save", key(1), "--to", target)
    wait_until(lambda: list(tmp_path.glob(".saved.unfinished-*/*")), "a file to appear")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert not target.exists()
    assert len(unfinished(tmp_path)) == 1
    wait_until(lambda: session.status().models[0].readers == 1, "the store to notice")  # the publisher stays a reader
    assert wooly("save", key(1), "--to", target).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_save_in_progress_is_not_swept(wooly, store, tmp_path):
    """Of two saves to one target, one succeeds and the other is refused; neither removes the other's files."""
    store.client().publish(key(1), [[1, LARGE]])
    target = tmp_path / "saved"
    processes = [wooly.start("save", key(1), "--to", target) for _ in range(2)]
    codes = sorted(process.wait(timeout=60) for process in processes)
    assert codes in ([0, 20], [0, 2])  # refused at the rename; or at once, if the second started late
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert wooly("restore", target, "--json").returncode == 0


def test_killed_while_restoring(wooly, store, session, tmp_path):
    """The store releases the segments, and the next restore is complete."""
    client = store.client()
    client.publish(key(1), [[1, LARGE]])
    assert wooly("save", key(1), "--to", tmp_path / "saved").returncode == 0
    client.leave(key(1))
    session.remove(key(1))
    process = wooly.start("restore", tmp_path / "saved")
    wait_until(lambda: session.status().totals.resident_bytes, "a segment to be allocated")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    wait_until(lambda: session.status().models == (), "the store to notice")
    assert session.status().totals.resident_bytes == 0
    assert session.status().counters.aborted_publishes == 1
    assert wooly("restore", tmp_path / "saved").returncode == 0
    assert wooly("verify", "--all").returncode == 0


def test_a_waiting_restore_publishes_after_the_publisher_ended(wooly, store, session, saved):
    """It was a waiter, and is granted the publication."""
    first = store.client()
    assert first.open(MANIFEST.key) == "granted"
    process = wooly.start("restore", saved, "--json")
    wait_until(lambda: any(client.role == "waiting" for client in session.status().clients), "the restore to wait")
    first.close()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert '"result":"restored"' in out
