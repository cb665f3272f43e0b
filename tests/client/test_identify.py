"""Checkpoint digests: computed once by one process, remembered by file identity, and never assumed."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.filesystems import ObjectStore, may_mount_fuse
from support.programs import finish_program, start_program
from support.waiting import wait_until

from shared_store.base.checkpoint import SETTLED_S
from shared_store.base.errors import CheckpointError
from shared_store.client.identify import Checkpoint

AGE_S = 3600
IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")


def write(path, data):
    """A file that is not fresh by its mtime (its ctime cannot be set)."""
    path.write_bytes(data)
    os.utime(path, (time.time() - AGE_S, time.time() - AGE_S))
    return path


def digest_of(session, files, **options):
    """Return the digest, and the number of bytes that were read for it."""
    read = []
    with Checkpoint(files).digest(session, timeout_s=30, progress=read.append, **options) as found:
        return found, sum(read)


ASK = """
import sys
from pathlib import Path
from client.test_identify import digest_of
from shared_store.client.session import Session
files = [(Path(path).name, Path(path)) for path in sys.argv[1:]]
with Session.connect(autostart=False) as session:
    sys.stdin.readline()
    found, read = digest_of(session, files)
    print(found.hex(), read)
"""


def test_of_four_processes_one_reads(sessions, tmp_path):
    """Four that ask at once get one digest, and the files' bytes are read by exactly one of them."""
    files = [write(tmp_path / f"{number}.safetensors", os.urandom(3 << 20)) for number in range(3)]
    processes = [start_program(ASK, *files, stdin=subprocess.PIPE) for _ in range(4)]
    session = sessions()
    wait_until(lambda: len(session.status().clients) == 5, "all to be connected", 60)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [finish_program(process).split() for process in processes]
    assert len({digest for digest, _ in answers}) == 1
    assert sorted(int(read) for _, read in answers) == [0, 0, 0, 9 << 20]
    assert digest_of(session, [(path.name, path) for path in files]) == (bytes.fromhex(answers[0][0]), 0)


def test_a_process_that_waited_continues_after_the_block(sessions, tmp_path, caplog):
    """A process that waits while another hashes gets the digest after that block has ended, and reads nothing."""
    path = write(tmp_path / "model.safetensors", b"x" * 100_000)
    first, second, order = sessions("first"), sessions("second"), []
    later = []

    def ask():
        found, read = digest_of(second, [("a", path)])
        order.append("second")
        return found, read

    def hashing(_):
        later.append(pool.submit(ask))
        wait_until(lambda: "waiting for" in caplog.text, "the second to wait")

    with caplog.at_level("INFO"), ThreadPoolExecutor(1) as pool:
        with Checkpoint([("a", path)]).digest(first, timeout_s=30, progress=hashing) as digest:
            first.status()
            order.append("first")
        assert later[0].result(timeout=30) == (digest, 0)
    assert order == ["first", "second"]


def test_a_fresh_file_is_read_once_it_has_settled(sessions, tmp_path):
    """A file that was just written is waited for, so that its digest can be remembered."""
    path = tmp_path / "fresh.safetensors"
    path.write_bytes(b"z" * 100_000)
    began = time.time()
    digest, read = digest_of(sessions(), [("a", path)])
    assert read == 100_000
    assert time.time() - path.stat().st_mtime >= SETTLED_S
    assert time.time() - began < SETTLED_S + 2
    assert digest_of(sessions(), [("a", path)]) == (digest, 0)


def test_a_file_from_the_future_is_read_but_not_remembered(sessions, tmp_path):
    """Its identity might not change with its bytes, so its digest is used once."""
    path = tmp_path / "future.safetensors"
    path.write_bytes(b"z" * 100_000)
    os.utime(path, (time.time() + AGE_S, time.time() + AGE_S))
    digest, read = digest_of(sessions(), [("a", path)])
    assert (digest, read) == digest_of(sessions(), [("a", path)])
    assert read == 100_000


def test_same_bytes_same_digest(sessions, tmp_path):
    """Renamed, copied and linked files in another directory are the same checkpoint; other names or bytes are not."""
    session = sessions()
    data = os.urandom(200_000)
    path = write(tmp_path / "model.safetensors", data)
    expected, _ = digest_of(session, [("model.safetensors", path)])
    other = tmp_path / "other"
    other.mkdir()
    copied = shutil.copy2(path, other / "copy")
    linked = other / "link"
    linked.symlink_to(path)
    one_byte = write(other / "changed", data[:100_000] + bytes([data[100_000] ^ 1]) + data[100_001:])
    assert digest_of(session, [("model.safetensors", copied)])[0] == expected
    assert digest_of(session, [("model.safetensors", linked)]) == (expected, 0)
    assert digest_of(session, [("model.safetensors", path.rename(other / "renamed"))])[0] == expected
    assert digest_of(session, [("model.safetensors", one_byte)])[0] != expected
    assert digest_of(session, [("other.safetensors", copied)])[0] != expected


@pytest.mark.parametrize("way", ["in place", "by another file"])
def test_a_file_changed_behind_the_same_size_and_mtime(sessions, tmp_path, way):
    """Size and mtime can be forged; the change is detected anyway."""
    session = sessions()
    path = write(tmp_path / "model.safetensors", b"a" * 100_000)
    before = path.stat()
    first, _ = digest_of(session, [("a", path)])
    if way == "in place":
        path.write_bytes(b"b" * 100_000)
    else:
        (tmp_path / "new").write_bytes(b"b" * 100_000)
        (tmp_path / "new").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second, read = digest_of(session, [("a", path)])
    assert (second != first, read) == (True, 100_000)


def test_a_file_changed_while_it_is_hashed(sessions, tmp_path):
    """It is an error, nothing is remembered, and the next process does not wait."""
    path = write(tmp_path / "model.safetensors", b"a" * 100_000)

    def touch(_):
        with path.open("r+b") as file:
            file.write(b"b")

    session = sessions()
    with (
        pytest.raises(CheckpointError, match="changed while it was being"),
        Checkpoint([("a", path)]).digest(session, timeout_s=30, progress=touch),
    ):
        pytest.fail("a digest was given")
    assert digest_of(sessions(), [("a", path)])[1] == 100_000


def test_a_file_changed_since_the_checkpoint_was_listed(sessions, tmp_path):
    """Before hashing, and between hashing and loading."""
    path = write(tmp_path / "model.safetensors", b"a" * 1000)
    listed = Checkpoint([("a", path)])
    listed.check_unchanged()
    write(path, b"b" * 1000)
    with pytest.raises(CheckpointError, match="changed while"), listed.digest(sessions(), timeout_s=30):
        pytest.fail("a digest was given")
    with pytest.raises(CheckpointError, match="changed while it was being loaded"):
        listed.check_unchanged()


def test_a_missing_file_and_an_empty_checkpoint(sessions, tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        Checkpoint([("a", tmp_path / "absent")])
    with pytest.raises(CheckpointError, match="no weight files"):
        digest_of(sessions(), [])


def test_the_process_that_hashes_dies(sessions, tmp_path):
    """Its turn ends, and the next process reads the files."""
    path = write(tmp_path / "model.safetensors", b"a" * 100_000)
    program = ASK.replace("print(found.hex(), read)", "").replace(
        "found, read = digest_of(session, files)",
        "from shared_store.client.identify import Checkpoint\n"
        "    with Checkpoint(files).digest(session, timeout_s=30, "
        "progress=lambda _: (print('hashing', flush=True), sys.stdin.readline())): pass",
    )
    process = start_program(program, path, stdin=subprocess.PIPE)
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "hashing\n"
    finally:
        process.kill()
        process.communicate()
    assert digest_of(sessions(), [(path.name, path)])[1] == 100_000


@pytest.fixture
def objects(tmp_path):
    """Return an object store behind FUSE, whose files have made up inodes and times."""
    if not may_mount_fuse():
        pytest.skip("needs to mount FUSE file systems: root, and /dev/fuse")
    made = ObjectStore(tmp_path)
    yield made
    made.unmount()


def test_a_file_changed_behind_an_identity_that_is_made_up(sessions, objects, caplog):
    """An object is replaced by one of the same size, and nothing but its bytes shows it: it is hashed again."""
    session, files = sessions(), [("a", objects.mounted / "model.safetensors")]
    (objects.backing / "model.safetensors").write_bytes(b"a" * 100_000)
    before = files[0][1].stat()
    with caplog.at_level("INFO"):
        first, read = digest_of(session, files)
    assert read == 100_000
    (objects.backing / "model.safetensors").write_bytes(b"b" * 100_000)
    after = files[0][1].stat()
    assert [getattr(after, name) for name in IDENTITY] == [getattr(before, name) for name in IDENTITY]
    second, read = digest_of(session, files)
    assert (second != first, read) == (True, 100_000)
    third, _ = digest_of(session, [("a", write(objects.backing / "other", b"b" * 100_000))])
    assert third == second
    assert "at every load: the times of files on FUSE may be made up" in caplog.text


def test_a_file_changed_behind_such_an_identity_while_it_is_loaded(sessions, objects):
    """The bytes are compared after loading, because the identity cannot be."""
    (objects.backing / "model.safetensors").write_bytes(b"a" * 100_000)
    listed = Checkpoint([("a", objects.mounted / "model.safetensors")])
    with listed.digest(sessions(), timeout_s=30):
        listed.check_unchanged()
        (objects.backing / "model.safetensors").write_bytes(b"b" * 100_000)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            listed.check_unchanged()


def test_a_directory_that_the_user_trusts_is_read_once(sessions, objects, monkeypatch):
    (objects.backing / "model.safetensors").write_bytes(b"a" * 100_000)
    files = [("a", objects.mounted / "model.safetensors")]
    monkeypatch.setenv("WOOLY_TRUSTED_DIRECTORIES", str(objects.mounted))
    digest, read = digest_of(sessions(), files)
    assert read == 100_000
    assert digest_of(sessions(), files) == (digest, 0)
