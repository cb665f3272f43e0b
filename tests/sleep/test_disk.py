"""Models of `cpu` leave host memory for files without a name, and return from them to the same addresses."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest
from sleep.test_sleep import KEY, MIB, MODEL, away, published, readers, resident, right
from sleep.test_sleep_killed import reconnected
from support.actors import Actor
from support.content import key
from support.devices import ENVIRONMENT
from support.filesystems import SmallDisk, may_mount
from support.waiting import open_fds, open_segments, wait_until

from shared_store.base.errors import ConfigError, DigestMismatchError, ModelNotFoundError, OutOfMemoryError

WHOLE = 76 * MIB
"""Bytes of the segments of `MODEL`."""


@pytest.fixture
def store(start, swap_dir):
    """Start a keeper and its store, which swaps to a directory of the test."""
    return start(swap_dir=str(swap_dir))


@pytest.fixture
def process_of(directory):
    """Return a function that starts a process that uses host memory as its device. They end with the test."""
    made = []

    def make(name=""):
        made.append(Actor(env={**os.environ, **ENVIRONMENT}))
        made[-1].connect(directory=str(directory), name=name, device="cpu")
        return made[-1]

    yield make
    for client in made:
        client.kill()


def files_of(pid, directory):
    """Return the numbers of a process's descriptors of files in a directory."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(fd.readlink()).startswith(f"{directory}/"):
                found.append(int(fd.name))
        except FileNotFoundError:
            continue  # closed since it was listed
    return found


def on_disk(store):
    """Return the bytes of host copies that are files."""
    return next(found.disk_bytes for found in store.status().devices if found.id == "cpu")


def test_memory_is_released_and_returns_many_times(store, process, swap_dir):
    """No process has a memory file while the reader is away; addresses and bytes are what they were."""
    (engine,) = published(process)
    before, addresses = resident(store, "cpu"), engine.addresses()
    seen = set()
    for _ in range(5):
        engine.sleep()
        keeper = store.status().keeper.pid
        wait_until(lambda pid=keeper: open_segments(pid) == 0, "the keeper to close the memory")
        assert engine.mapped() == 0
        assert resident(store, "cpu") == 0
        assert open_segments(engine.pid) == open_segments(store.store_pid) == 0
        assert on_disk(store) == before
        (model,) = store.status().models
        assert (model.resident_bytes, model.host_bytes, model.disk_bytes, model.away) == (0, 0, model.bytes, 1)
        assert engine.wake() == [before, 0]
        assert engine.addresses() == addresses
        assert right(engine)
        seen.add((open_segments(store.store_pid), len(files_of(store.store_pid, swap_dir)), open_fds(engine.pid)))
    assert len(seen) == 1
    counters = store.status().counters
    assert (counters.fallbacks, counters.publishes, counters.returns, counters.sleeps) == (0, 1, 5, 5)


def test_files_have_no_name_and_only_their_owner_opens_them(store, process, swap_dir):
    """Processes that read them cannot write to them."""
    (engine,) = published(process)
    engine.sleep()
    assert files_of(store.store_pid, swap_dir)
    assert list(swap_dir.iterdir()) == []
    (one, *_), pid = files_of(engine.pid, swap_dir), engine.pid
    found = Path(f"/proc/{pid}/fd/{one}").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_nlink, found.st_uid) == (0o600, 0, os.getuid())
    for fd in files_of(pid, swap_dir):
        flags = int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
        assert flags & os.O_ACCMODE == os.O_RDONLY


def test_memory_stays_while_one_reader_is_awake(store, process):
    """It is released with the last one; then one process reads the file, and the other attaches."""
    one, other = published(process, 2)
    before = resident(store, "cpu")
    one.sleep()
    assert resident(store, "cpu") == before
    assert right(other)
    other.sleep()
    assert (resident(store, "cpu"), on_disk(store)) == (0, before)
    for engine in (one, other):
        engine.begin("wake")
    assert [engine.finish() for engine in (one, other)] == [[before, 0]] * 2
    assert right(one)
    assert right(other)
    counters = store.status().counters
    assert (counters.returns, counters.wakes, counters.fallbacks) == (1, 2, 0)


def test_the_second_departure_writes_nothing(store, process, swap_dir):
    """The file stays when the model returns."""
    (engine,) = published(process)
    engine.sleep()
    pid = store.store_pid
    before = {Path(f"/proc/{pid}/fd/{fd}").stat().st_ino for fd in files_of(pid, swap_dir)}
    engine.wake()
    engine.sleep()
    assert {Path(f"/proc/{pid}/fd/{fd}").stat().st_ino for fd in files_of(pid, swap_dir)} == before


def test_a_new_process_loads_the_model_while_its_readers_are_away(store, process):
    """It fills the segments that left, so they share it when they return."""
    one, other = published(process, 2)
    before = resident(store, "cpu")
    for engine in (one, other):
        engine.sleep()
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"
    assert resident(store, "cpu") == before
    assert [engine.wake() for engine in (one, other)] == [[before, 0]] * 2
    assert resident(store, "cpu") == before
    assert all(right(engine) for engine in (one, other, fresh))


def test_a_segment_returns_whole(store, process):
    """The store writes the blobs of other models in it, whatever version its publisher has."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, MIB]])
    (engine,) = published(process)
    addresses, before = engine.addresses(), resident(store, "cpu")
    other.sleep()
    engine.sleep()
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"
    assert engine.wake()[1] == other.wake()[1] == 0
    assert engine.addresses() == addresses
    assert all(right(one) for one in (fresh, engine, other))
    assert resident(store, "cpu") == before
    assert store.status().counters.fallbacks == 0


def test_changed_bytes_are_not_served(store, process, swap_dir):
    """The process stays away; it returns once the bytes are right again."""
    (engine,) = published(process)
    engine.sleep()
    pid = store.store_pid
    files = files_of(pid, swap_dir)
    large = max(files, key=lambda fd: Path(f"/proc/{pid}/fd/{fd}").stat().st_size)
    with Path(f"/proc/{pid}/fd/{large}").open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, 1000)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), 1000)
        with pytest.raises(DigestMismatchError):
            engine.wake()
        assert engine.mapped() == 0
        assert resident(store, "cpu") == 0
        os.pwrite(file.fileno(), byte, 1000)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_no_space_in_the_directory(store, process):
    """Leaving is refused, and the process goes on; it leaves once there is space."""
    (engine,) = published(process)
    before = resource.prlimit(store.store_pid, resource.RLIMIT_FSIZE)
    resource.prlimit(store.store_pid, resource.RLIMIT_FSIZE, (MIB, before[1]))
    with pytest.raises(OutOfMemoryError, match=r"swap directory.*WOOLY_SWAP_DIR"):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)
    assert on_disk(store) == 0
    assert away(store) == {("cpu", KEY): 0}
    resource.prlimit(store.store_pid, resource.RLIMIT_FSIZE, before)
    engine.sleep()
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


@pytest.mark.skipif(not may_mount(), reason="may not mount file systems")
def test_a_full_disk(start, process_of, swap_dir):
    """A model that needs more than the disk has does not leave."""
    disk = SmallDisk(swap_dir)
    try:
        store = start(swap_dir=str(swap_dir))
        engine = process_of()
        engine.publish(key=KEY, model=MODEL)
        with pytest.raises(OutOfMemoryError, match="free disk space"):
            engine.sleep()
        assert right(engine)
        assert on_disk(store) == 0
    finally:
        disk.unmount()


def test_without_a_directory(start, process_of, swap_dir):
    """The process goes on."""
    start(swap_dir=str(swap_dir / "absent"))
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    with pytest.raises(ConfigError, match="WOOLY_SWAP_DIR"):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)


def test_no_memory_to_return(start, process_of, swap_dir):
    """Nothing is mapped, and it succeeds once another model can be evicted."""
    store = start(swap_dir=str(swap_dir), max_resident={"cpu": 80 * MIB})
    engine, other = process_of(), process_of()
    engine.publish(key=KEY, model=MODEL)
    engine.sleep()
    other.publish(key=key(2), model=[[7, 40 * MIB]])
    with pytest.raises(OutOfMemoryError):
        engine.wake()
    assert engine.mapped() == 0
    other.leave(key=key(2))
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)
    assert store.status().counters.fallbacks == 0


def test_files_of_models_that_nobody_uses_are_released(store, process, swap_dir):
    """With the model."""
    (engine,) = published(process)
    engine.sleep()
    engine.kill()
    wait_until(lambda: list(away(store).values()) == [0], "it to end")
    assert on_disk(store) == WHOLE
    client = store.client()
    with pytest.raises(ModelNotFoundError, match="only attaches"):
        client.open(KEY, publish=False)
    client.remove(KEY)
    assert on_disk(store) == 0
    wait_until(lambda: not files_of(store.store_pid, swap_dir), "the store to close them")


def test_no_client_names_files_as_a_device(store):
    from shared_store.base.errors import UnknownDeviceError

    with pytest.raises(UnknownDeviceError):
        store.client().open(KEY, device="disk")


def test_store_killed_while_all_are_away(store, process):
    """The keeper has the files: the first that returns fills host memory, the second attaches."""
    engines = published(process, 2)
    before, addresses = resident(store, "cpu"), [engine.addresses() for engine in engines]
    for engine in engines:
        engine.sleep()
    pid = store.kill_store()
    for engine in engines:
        reconnected(engine, pid)
    assert (resident(store, "cpu"), on_disk(store)) == (0, before)
    assert away(store) == {("cpu", KEY): 2}
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert [engine.addresses() for engine in engines] == addresses
    assert all(right(engine) for engine in engines)


def test_store_killed_while_one_is_away(store, process):
    """The model is in host memory, and has files."""
    one, other = published(process, 2)
    one.sleep()
    pid = store.kill_store()
    reconnected(one, pid)
    reconnected(other, pid)
    assert (readers(store), away(store)) == ({("cpu", KEY): 1}, {("cpu", KEY): 1})
    other.sleep()
    wait_until(lambda: resident(store, "cpu") == 0, "the memory to be released")  # after the grace period
    assert [one.wake(), other.wake()] == [[WHOLE, 0]] * 2
    assert right(one)
    assert right(other)


def test_keeper_and_store_killed_while_all_are_away(start, store, process, swap_dir):
    """The processes offer the files to the next store."""
    engines = published(process, 2)
    for engine in engines:
        engine.sleep()
    store.kill_both()
    again = start(swap_dir=str(swap_dir))
    wait_until(lambda: away(again) == {("cpu", KEY): 2}, "both to rejoin")
    assert (resident(again, "cpu"), on_disk(again)) == (0, WHOLE)
    assert [engine.wake() for engine in engines] == [[WHOLE, 0]] * 2
    assert all(right(engine) for engine in engines)


def test_killed_while_it_leaves(store, process):
    """The file that the store wrote for it is dropped, and another process has it written."""
    model = [*MODEL, [6, 150 * MIB]]
    one, other = published(process, 2, model)
    before = resident(store, "cpu")
    one.begin("sleep")
    one.kill()
    other.sleep()
    assert (resident(store, "cpu"), on_disk(store)) == (0, before)
    assert other.wake() == [before, 0]
    assert right(other)
