"""Where host memory is short, host copies are dropped or moved to files, while processes sleep with them."""

from __future__ import annotations

import errno
import threading

import pytest
from sleep.test_disk import WHOLE, files_of
from sleep.test_host_budget import copies
from sleep.test_sleep import KEY, MIB, published, resident, right
from sleep.test_sleep_killed import reconnected
from support.content import key
from support.devices import DEVICE
from support.plain_workload import PlainWorkload
from support.served import ServedStore
from support.waiting import open_fds, open_segments, wait_until

from shared_store.memory.fake import FakeBackend
from shared_store.store.space import host_pressure

BUDGET = 200 * MIB


@pytest.fixture
def store(start, swap_dir):
    """Start a store whose budget has a place for two models like `MODEL`."""
    return start(swap_dir=str(swap_dir), host_budget=BUDGET)


@pytest.fixture
def need(directory):
    """Return a function that starts a workload of the device that uses MiB of host memory. It ends with the test."""
    workloads = []

    def join(mib):
        workloads.append(PlainWorkload(directory, "in need", device=DEVICE))
        workloads[-1].join("resident", {DEVICE: 1, "cpu": mib})

    yield join
    for workload in workloads:
        workload.close()


def test_spare_copies_are_dropped_first(store, process, need):
    """The copy that a sleeper needs stays in host memory."""
    one, other = process("one"), process("other")
    one.publish(key=KEY, model=[[1, 60 * MIB]])
    other.publish(key=key(2), model=[[2, 60 * MIB]])
    assert one.copy_ahead()
    other.sleep()
    assert copies(store) == (120 * MIB, 0)
    need(130)
    wait_until(lambda: copies(store) == (60 * MIB, 0), "the spare copy to be dropped")
    assert resident(store) == 60 * MIB
    assert right(one)
    assert other.wake() == [60 * MIB, 0]
    assert right(other)


def test_copies_of_sleepers_move_to_files(store, process, need, swap_dir):
    """Nobody keeps the memory; the sleepers return from the files to the same addresses."""
    engines = published(process, 2)
    addresses = [engine.addresses() for engine in engines]
    for engine in engines:
        engine.sleep()
    before = [open_fds(engine.pid) for engine in engines]
    assert copies(store) == (WHOLE, 0)
    need(190)
    wait_until(lambda: copies(store) == (0, WHOLE), "the copies to move")
    keeper = store.status().keeper.pid
    pids = [keeper, store.store_pid, *(engine.pid for engine in engines)]
    for pid in pids:
        wait_until(lambda pid=pid: open_segments(pid) == 0, "the memory to be closed")
        assert files_of(pid, swap_dir)
    wait_until(lambda: [open_fds(engine.pid) for engine in engines] == before, "no descriptor to be left")
    (model,) = store.status().models
    assert (model.away, model.resident_bytes, model.host_bytes, model.disk_bytes) == (2, 0, 0, model.bytes)
    assert [engine.wake() for engine in engines] == [[WHOLE, 0]] * 2
    assert [engine.addresses() for engine in engines] == addresses
    assert all(right(engine) for engine in engines)
    assert store.status().counters.fallbacks == 0


def test_the_least_recently_used_model_moves_first(store, process, need):
    """And no more than is needed."""
    one, other = process("one"), process("other")
    one.publish(key=KEY, model=[[1, 60 * MIB]])
    other.publish(key=key(2), model=[[2, 60 * MIB]])
    other.sleep()
    one.sleep()
    need(130)
    wait_until(lambda: copies(store) == (60 * MIB, 60 * MIB), "one to move")
    found = {model.key: model.disk_bytes for model in store.status().models}
    assert found == {KEY: 0, key(2): 60 * MIB}
    assert one.wake() == other.wake() == [60 * MIB, 0]
    assert right(one)
    assert right(other)


def test_store_killed_after_a_move(store, process, need):
    """The keeper has the files."""
    (engine,) = published(process)
    engine.sleep()
    need(190)
    wait_until(lambda: copies(store) == (0, WHOLE), "the copies to move")
    pid = store.kill_store()
    reconnected(engine, pid)
    assert copies(store) == (0, WHOLE)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_keeper_and_store_killed_after_a_move(start, store, process, need, swap_dir):
    """The process offers the files that it has by now."""
    (engine,) = published(process)
    engine.sleep()
    need(190)
    wait_until(lambda: copies(store) == (0, WHOLE), "the copies to move")
    wait_until(lambda: open_segments(engine.pid) == 0, "the process to exchange its descriptors")
    store.kill_both()
    again = start(swap_dir=str(swap_dir), host_budget=BUDGET)
    wait_until(lambda: [model.away for model in again.status().models] == [1], "it to rejoin")
    assert copies(again) == (0, WHOLE)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_no_space_for_files(start, process_of, need, swap_dir):
    """The copies stay in host memory, and nothing is lost."""
    store = start(swap_dir=str(swap_dir / "absent"), host_budget=BUDGET)
    (engine,) = published(process_of)
    engine.sleep()
    need(150)
    wait_until(lambda: "cannot move the host copy" in store.log(), "the store to try")
    assert copies(store) == (WHOLE, 0)
    assert engine.wake() == [WHOLE, 0]
    assert right(engine)


def test_an_unexpected_error_is_logged_and_the_store_looks_again(directory, monkeypatch, caplog):
    """As when the store has no descriptor left to read the machine's free memory with."""
    looked = threading.Semaphore(0)

    async def relieve(_self):
        looked.release()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(host_pressure, "LOOK_S", 0.01)
    monkeypatch.setattr(host_pressure.HostPressure, "relieve", relieve)
    with ServedStore(directory, FakeBackend("fake")) as served:
        served.call(served.parts.host_pressure.start)
        for _ in range(3):
            assert looked.acquire(timeout=20)
    said = [record for record in caplog.records if "freeing host memory" in record.getMessage()]
    assert len(said) >= 2
    assert all("Too many open files" in str(record.exc_info) for record in said)
