"""Stores and processes are killed while models sleep, fall asleep or wake."""

from __future__ import annotations

import pytest
from sleep.test_sleep import MIB, MODEL, published, readers, resident, right
from support.devices import DEVICE
from support.waiting import wait_until

from shared_store.base.errors import StoreUnavailableError


def reconnected(engine, pid):
    """Wait until a client is connected to another store than `pid`."""
    wait_until(lambda: engine.alive() and engine.store_pid() != pid, "the client to reconnect")


def test_store_killed_while_one_sleeps(store, process):
    """The next store counts it as a reader of the host copy and not of the model; waking succeeds."""
    one, other = published(process, 2)
    before, addresses = resident(store), one.addresses()
    one.sleep()
    pid = store.kill_store()
    reconnected(one, pid)
    reconnected(other, pid)
    assert sorted((device, n) for (device, _), n in readers(store).items()) == [(DEVICE, 1), ("cpu", 1)]
    assert one.wake() == [before, 0]
    assert one.addresses() == addresses
    assert right(one)
    assert right(other)


def test_store_killed_while_all_sleep(store, process):
    """The device stays empty; the first that wakes publishes the model, the second attaches."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    pid = store.kill_store()
    for engine in engines:
        reconnected(engine, pid)
    assert resident(store) == 0
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert all(right(engine) for engine in engines)
    assert resident(store) == before


def test_keeper_and_store_killed_while_all_sleep(start, store, process):
    """The sleepers offer the host copy to the next store, and wake from it."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    store.kill_both()
    again = start()
    wait_until(lambda: list(readers(again).values()) == [2], "both to rejoin")
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert all(right(engine) for engine in engines)


def test_waking_without_a_store(store, process):
    """The process wakes in private memory and works, but cannot sleep again."""
    (engine,) = published(process)
    before, addresses = resident(store), engine.addresses()
    engine.sleep()
    store.kill_both()
    assert engine.wake() == [0, before]
    assert engine.addresses() == addresses
    assert right(engine)
    with pytest.raises(StoreUnavailableError):
        engine.sleep()
    assert right(engine)


def test_sleeping_without_a_store(store, process):
    """It is refused, and the process stays awake."""
    (engine,) = published(process)
    store.kill_both()
    with pytest.raises(StoreUnavailableError):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)


def test_store_and_last_reader_killed(store, process):
    """The model leaves the device when the grace period ends."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    other.stop()
    pid = store.kill_store()
    other.kill()
    reconnected(one, pid)
    assert resident(store) == before  # its readers may still rejoin
    wait_until(lambda: resident(store) == 0, "the device to be empty")
    assert one.wake() == [before, 0]
    assert right(one)


def test_one_of_two_sleepers_is_killed(store, process):
    """The host copy stays for the other one."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    other.sleep()
    one.kill()
    wait_until(lambda: list(readers(store).values()) == [1], "it to end")
    assert other.wake() == [before, 0]
    assert right(other)


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_killed_while_copying(store, process, what):
    """The publication is aborted, and the other process publishes."""
    model = [*MODEL, [6, 150 * MIB]]
    one, other = published(process, 2, model)
    before = resident(store)
    if what == "wake":
        one.sleep()
        other.sleep()
    one.begin(what)
    wait_until(lambda: any(model.state == "publishing" for model in store.status().models), "it to copy")
    one.kill()
    assert other.sleep() is None
    assert other.wake() == [before, 0]
    assert right(other)


def test_store_killed_while_waking(store, process):
    """The process asks the next store, or wakes in private memory: the bytes are right either way."""
    model = [*MODEL, [6, 150 * MIB]]
    (engine,) = published(process, 1, model)
    addresses = engine.addresses()
    engine.sleep()
    engine.begin("wake")
    wait_until(lambda: any(model.state == "publishing" for model in store.status().models), "it to copy")
    store.kill_store()
    engine.finish()
    assert engine.addresses() == addresses
    assert engine.mapped() == len(addresses)
    assert right(engine)
