"""Stores and processes are killed while models sleep, fall asleep or wake."""

from __future__ import annotations

import os
import signal

import pytest
from sleep.test_sleep import KEY, MIB, MODEL, away, published, readers, resident, right
from support.devices import DEVICE
from support.waiting import wait_until

from shared_store.base.errors import StoreUnavailableError, WoolyError


def reconnected(engine, pid):
    """Wait until a client is connected to another store than `pid`."""
    wait_until(lambda: engine.alive() and engine.store_pid() != pid, "the client to reconnect")


def test_store_killed_while_one_sleeps(store, process):
    """The next store counts it as a reader that is away; waking succeeds."""
    one, other = published(process, 2)
    before, addresses = resident(store), one.addresses()
    one.sleep()
    pid = store.kill_store()
    reconnected(one, pid)
    reconnected(other, pid)
    assert (readers(store), away(store)) == ({(DEVICE, KEY): 1}, {(DEVICE, KEY): 1})
    assert one.wake() == [before, 0]
    assert one.addresses() == addresses
    assert right(one)
    assert right(other)


def test_store_killed_while_all_sleep(store, process):
    """The device stays empty; the first that wakes fills it, the second attaches."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    pid = store.kill_store()
    for engine in engines:
        reconnected(engine, pid)
    assert resident(store) == 0
    assert away(store) == {(DEVICE, KEY): 2}
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert all(right(engine) for engine in engines)
    assert resident(store) == before
    assert store.status().counters.publishes == 0


def test_keeper_and_store_killed_while_all_sleep(start, store, process):
    """The sleepers offer the host copies to the next store, and wake from them."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    store.kill_both()
    again = start()
    wait_until(lambda: away(again) == {(DEVICE, KEY): 2}, "both to rejoin")
    assert (resident(again), resident(again, "cpu")) == (0, before)
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
    """The host copies stay for the other one."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    other.sleep()
    one.kill()
    wait_until(lambda: list(away(store).values()) == [1], "it to end")
    assert other.wake() == [before, 0]
    assert right(other)


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_killed_while_copying(store, process, what):
    """What it made is dropped, and the other process makes it."""
    model = [*MODEL, [6, 150 * MIB]]
    one, other = published(process, 2, model)
    before = resident(store)
    if what == "wake":
        one.sleep()
        other.sleep()
    one.begin(what)
    if what == "wake":
        wait_until(lambda: any(model.state == "publishing" for model in store.status().models), "it to copy")
    else:
        wait_until(lambda: resident(store, "cpu") > 0, "it to copy")
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


def test_keeper_and_store_killed_while_one_sleeps(start, store, process):
    """One brings the device's memory back, the other the host copies, in any order; both are one model again."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    store.kill_both()
    again = start()
    wait_until(lambda: (readers(again), away(again)) == ({(DEVICE, KEY): 1}, {(DEVICE, KEY): 1}), "both to rejoin")
    assert (resident(again), resident(again, "cpu")) == (before, before)
    other.sleep()
    wait_until(lambda: resident(again) == 0, "the device to be empty")  # after the grace period
    assert [one.wake(), other.wake()] == [[before, 0]] * 2
    assert right(one)
    assert right(other)


def test_store_killed_while_falling_asleep(store, process):
    """It sleeps or stays awake, with the right bytes; the other one goes on."""
    model = [*MODEL, [6, 150 * MIB]]
    one, other = published(process, 2, model)
    one.begin("sleep")
    wait_until(lambda: resident(store, "cpu") > 0, "it to copy")
    pid = store.kill_store()
    try:
        one.finish()
    except WoolyError:
        assert one.mapped() == len(one.addresses())
    reconnected(one, pid)
    one.wake()
    assert right(one)
    assert right(other)


def test_a_new_keeper_has_the_host_copies(store, process):
    """It replaces one that was killed, then the store is killed: the sleeper wakes from what the keeper retained."""
    (engine,) = published(process)
    before = resident(store)
    engine.sleep()
    keeper = store.status().keeper.pid
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: (found := store.status().keeper).state == "ok" and found.pid != keeper, "another keeper")
    pid = store.kill_store()
    reconnected(engine, pid)
    assert away(store) == {(DEVICE, KEY): 1}
    assert (resident(store), resident(store, "cpu")) == (0, before)
    assert engine.wake() == [before, 0]
    assert right(engine)


def test_model_quarantined_while_one_sleeps(store, process):
    """The sleeper has right bytes, and publishes the model again; the other one keeps its mappings."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    other.quarantine(key=KEY, indexes=[0])
    assert store.status().models == ()
    assert one.wake() == [before, 0]
    assert right(one)
    assert readers(store) == {(DEVICE, KEY): 1}
    one.sleep()
    assert one.wake() == [before, 0]
    other.kill()
    wait_until(lambda: resident(store) == before, "the quarantined segments to be released")
    assert right(one)
