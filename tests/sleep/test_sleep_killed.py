"""Stores and processes are killed while models sleep, fall asleep and wake."""

from __future__ import annotations

import pytest
from sleep.test_sleep import MIB, MODEL, published, readers, resident, right
from support.devices import DEVICE
from support.waiting import wait_until

from shared_store.base.errors import StoreUnavailableError


def back(engine, pid):
    """Wait until a client is connected to a store that is not this one."""
    wait_until(lambda: engine.alive() and engine.store_pid() != pid, "the client to be back")


def test_store_killed_while_one_sleeps(kept, process):
    """The next store counts it as reader of the host copy, and not of the model; it wakes as ever."""
    one, other = published(process, 2)
    before, addresses = resident(kept), one.addresses()
    one.sleep()
    pid = kept.kill_store()
    back(one, pid)
    back(other, pid)
    assert sorted((device, n) for (device, _), n in readers(kept).items()) == [(DEVICE, 1), ("cpu", 1)]
    assert one.wake() == [before, 0]
    assert one.addresses() == addresses
    assert right(one)
    assert right(other)


def test_store_killed_while_all_sleep(kept, process):
    """Nothing is on the device before and after; the first that wakes brings the model back, the second shares it."""
    engines = published(process, 2)
    before = resident(kept)
    for engine in engines:
        engine.sleep()
    pid = kept.kill_store()
    for engine in engines:
        back(engine, pid)
    assert resident(kept) == 0
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert all(right(engine) for engine in engines)
    assert resident(kept) == before


def test_keeper_and_store_killed_while_all_sleep(start, kept, process):
    """The sleepers give the host copy to the next store, and wake from it."""
    engines = published(process, 2)
    before = resident(kept)
    for engine in engines:
        engine.sleep()
    kept.kill_both()
    again = start()
    wait_until(lambda: list(readers(again).values()) == [2], "both to be back")
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert all(right(engine) for engine in engines)


def test_no_store_any_more(kept, process):
    """Nobody serves: the sleeper wakes with memory of its own, and cannot sleep again, but works."""
    (engine,) = published(process)
    before, addresses = resident(kept), engine.addresses()
    engine.sleep()
    kept.kill_both()
    assert engine.wake() == [0, before]
    assert engine.addresses() == addresses
    assert right(engine)
    with pytest.raises(StoreUnavailableError):
        engine.sleep()
    assert right(engine)


def test_store_killed_before_anybody_slept(kept, process):
    """Without a store that answers, sleeping is refused, and the engine is as it was."""
    (engine,) = published(process)
    kept.kill_both()
    with pytest.raises(StoreUnavailableError):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)


def test_the_one_that_worked_does_not_come_back(kept, process):
    """Store and worker are gone at once: when nobody can come back any more, the device is empty."""
    one, other = published(process, 2)
    before = resident(kept)
    one.sleep()
    other.stop()
    pid = kept.kill_store()
    other.kill()
    back(one, pid)
    assert resident(kept) == before  # nobody knows yet who is on the way
    wait_until(lambda: resident(kept) == 0, "the device to be empty")
    assert one.wake() == [before, 0]
    assert right(one)


def test_a_sleeper_is_killed(kept, process):
    """Another one's host copy stays; with the last one it is a cache."""
    one, other = published(process, 2)
    before = resident(kept)
    one.sleep()
    other.sleep()
    one.kill()
    wait_until(lambda: list(readers(kept).values()) == [1], "it to be gone")
    assert other.wake() == [before, 0]
    assert right(other)


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_killed_in_the_middle(kept, process, what):
    """Whoever is killed while it copies leaves nothing half done: the other one does it."""
    model = [*MODEL, [6, 150 * MIB]]
    one, other = published(process, 2, model)
    before = resident(kept)
    if what == "wake":
        one.sleep()
        other.sleep()
    one.begin(what)
    wait_until(lambda: any(it.state == "publishing" for it in kept.status().models), "it to copy")
    one.kill()
    assert other.sleep() is None
    assert other.wake() == [before, 0]
    assert right(other)


def test_store_killed_in_the_middle_of_waking(kept, process):
    """It is asked again, or the next one is: the bytes are right, wherever they are."""
    model = [*MODEL, [6, 150 * MIB]]
    (engine,) = published(process, 1, model)
    addresses = engine.addresses()
    engine.sleep()
    engine.begin("wake")
    wait_until(lambda: any(it.state == "publishing" for it in kept.status().models), "it to copy")
    kept.kill_store()
    engine.finish()
    assert engine.addresses() == addresses
    assert engine.mapped() == len(addresses)
    assert right(engine)
