"""Host copies within the budget of host memory: made ahead where they take nothing from others, else in files."""

from __future__ import annotations

import pytest
from sleep.test_disk import WHOLE, files_of
from sleep.test_sleep import KEY, MIB, MODEL, away, published, resident, right
from sleep.test_sleep_killed import reconnected
from support.content import key
from support.devices import DEVICE
from support.waiting import wait_until

from shared_store.base.errors import DigestMismatchError


@pytest.fixture
def short(start, swap_dir):
    """Start a store whose budget has no place for the model's host copy."""
    return start(swap_dir=str(swap_dir), host_budget=60 * MIB)


def copies(store):
    """Return the bytes of host copies in host memory, and in files."""
    (found,) = (device for device in store.status().devices if device.id == DEVICE)
    return found.host_bytes, found.disk_bytes


def test_copies_are_made_ahead(store, process):
    """They are spare at once, and the departure makes none."""
    (engine,) = published(process)
    assert engine.copy_ahead()
    assert copies(store) == (WHOLE, 0)
    assert resident(store) == WHOLE
    assert right(engine)
    assert engine.begin_host_copies(key=KEY) == 0  # promised
    engine.release_host_copies(key=KEY)
    engine.sleep()
    assert resident(store) == 0
    assert engine.wake() == [WHOLE, 0]
    assert engine.copy_ahead()
    assert right(engine)


def test_copies_made_ahead_give_way(start, process_of):
    """To models of host memory, without an eviction."""
    store = start(max_resident={"cpu": 120 * MIB})
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    assert engine.copy_ahead()
    client = store.client()
    client.publish(key(3), [[8, 100 * MIB]])
    assert copies(store) == (0, 0)
    assert store.status().counters.evictions == 0
    assert not engine.copy_ahead()  # it would take memory from the model
    client.leave(key(3))
    assert not engine.copy_ahead()
    assert [model.key for model in store.status().models] == [KEY, key(3)]


def test_copies_ahead_keep_to_the_budget(short, process_of):
    (engine,) = published(process_of)
    assert not engine.copy_ahead()
    assert copies(short) == (0, 0)
    assert right(engine)


def test_a_model_beyond_the_budget_leaves_for_files(short, process_of, swap_dir):
    """It returns from them, shared; the files stay for the next departure."""
    one, other = published(process_of, 2)
    one.sleep()
    other.sleep()
    assert copies(short) == (0, WHOLE)
    assert (resident(short), resident(short, "cpu")) == (0, 0)
    (model,) = short.status().models
    assert (model.resident_bytes, model.host_bytes, model.disk_bytes) == (0, 0, model.bytes)
    assert [engine.wake() for engine in (one, other)] == [[WHOLE, 0]] * 2
    assert right(one)
    assert right(other)
    before = len(files_of(short.store_pid, swap_dir))
    one.sleep()
    other.sleep()
    assert len(files_of(short.store_pid, swap_dir)) == before
    assert one.wake() == [WHOLE, 0]


def test_a_model_beyond_the_limit_of_host_memory_leaves_for_files(start, process_of, swap_dir):
    store = start(max_resident={"cpu": 2 * MIB}, swap_dir=str(swap_dir))
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    engine.sleep()
    assert copies(store) == (0, WHOLE)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_spare_copies_are_dropped_for_the_budget(start, process_of, swap_dir):
    """A copy made ahead gives way to one that is needed now."""
    store = start(swap_dir=str(swap_dir), host_budget=90 * MIB)
    one, other = process_of("one"), process_of("other")
    one.publish(key=KEY, model=MODEL)
    other.publish(key=key(2), model=[[11, 60 * MIB]])
    assert one.copy_ahead()
    assert not other.copy_ahead()
    other.sleep()
    assert copies(store) == (60 * MIB, 0)
    one.sleep()
    assert copies(store) == (60 * MIB, WHOLE)
    assert one.wake() == [WHOLE, 0]
    assert other.wake() == [60 * MIB, 0]
    assert right(one)
    assert right(other)


def test_changed_bytes_of_a_file_are_not_served(short, process_of, swap_dir):
    import os
    from pathlib import Path

    (engine,) = published(process_of)
    engine.sleep()
    pid = short.store_pid
    sizes = {fd: Path(f"/proc/{pid}/fd/{fd}").stat().st_size for fd in files_of(pid, swap_dir)}
    with Path(f"/proc/{pid}/fd/{max(sizes, key=sizes.get)}").open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, 1000)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), 1000)
        with pytest.raises(DigestMismatchError):
            engine.wake()
        assert engine.mapped() == 0
        os.pwrite(file.fileno(), byte, 1000)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_store_killed_while_a_model_is_in_files(short, process_of):
    (engine,) = published(process_of)
    engine.sleep()
    pid = short.kill_store()
    reconnected(engine, pid)
    assert away(short) == {(DEVICE, KEY): 1}
    assert copies(short) == (0, WHOLE)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_keeper_and_store_killed_while_a_model_is_in_files(start, short, process_of, swap_dir):
    """The process offers the files."""
    (engine,) = published(process_of)
    engine.sleep()
    short.kill_both()
    again = start(swap_dir=str(swap_dir), host_budget=60 * MIB)
    wait_until(lambda: away(again) == {(DEVICE, KEY): 1}, "it to rejoin")
    assert copies(again) == (0, WHOLE)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)
