"""Asleep, a process uses no device memory; awake, it has the same bytes at the same addresses, shared if possible."""

from __future__ import annotations

import pytest
from support.content import key
from support.devices import DEVICE
from support.waiting import open_fds, open_segments, wait_until

from shared_store.base.errors import OutOfMemoryError, UnsupportedError
from shared_store.base.keys import host_key, is_key
from shared_store.base.manifest import Blob

MIB = 1 << 20
KEY = key(1)
MODEL = [[1, 40 * MIB], [2, 3 * MIB], [3, 30 * MIB], [2, 3 * MIB], [4, 0], [5, 1000]]
"""Two segments (64 MiB, and the rest); one blob twice; one blob without bytes."""


def resident(store, device=DEVICE):
    """Return the resident bytes of a device."""
    return next((found.resident_bytes for found in store.status().devices if found.id == device), 0)


def readers(store):
    """Return the number of readers of each model, by device and key."""
    return {(model.device, model.key): model.readers for model in store.status().models}


def published(process, count=1, model=MODEL):
    """Start processes that map a model. The first one publishes it."""
    made = [process(f"engine {number}") for number in range(count)]
    for engine in made:
        engine.publish(key=KEY, model=model)
    return made


def right(engine):
    """Return whether a process reads the model's bytes."""
    return engine.digests() == engine.expected()


def test_one_engine_many_times(store, process):
    """The device is empty while it sleeps; addresses, bytes, descriptors and the store's memory do not change."""
    (engine,) = published(process)
    before, addresses = resident(store), engine.addresses()
    seen = []
    for _ in range(20):
        engine.sleep()
        assert engine.mapped() == 0
        assert resident(store) == 0
        seen.append((resident(store, "cpu"), open_segments(engine.pid), open_segments(store.store_pid)))
        assert engine.wake() == [before, 0]
        assert engine.addresses() == addresses
        assert right(engine)
        assert resident(store) == before
    assert len(set(seen)) == 1
    status = store.status()
    assert status.counters.fallbacks == 0
    assert [model.readers for model in status.models if model.device == DEVICE] == [1]


def test_waking_leaves_no_descriptors(process):
    """The process has as many open as before it slept."""
    (engine,) = published(process)
    before = open_fds(engine.pid)
    engine.sleep()
    engine.wake()
    assert open_fds(engine.pid) == before


def test_one_of_two_sleeps(store, process):
    """The model stays on the device, and the sleeper maps it again without a copy."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    assert resident(store) == before
    assert right(other)
    assert one.wake() == [before, 0]
    assert right(one)
    assert store.status().counters.publishes == 2  # the model, and its host copy


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_sleep_and_wake_in_either_order(store, process, order):
    """The device is empty while both sleep; they share one host copy, and the model when they wake."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    assert resident(store) == 0
    host = [model for model in store.status().models if model.device == "cpu"]
    assert [(model.readers, model.name) for model in host] == [(2, "model (host copy)")]
    for number in order:
        assert engines[number].wake() == [before, 0]
        assert resident(store) == before
    assert all(right(engine) for engine in engines)
    assert [n for (device, _), n in readers(store).items() if device == DEVICE] == [2]


def test_both_wake_at_once(store, process):
    """One of them publishes; the other waits and attaches."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    publishes = store.status().counters.publishes
    for engine in engines:
        engine.begin("wake")
    assert [engine.finish() for engine in engines] == [[before, 0]] * 2
    assert resident(store) == before
    assert store.status().counters.publishes == publishes + 1
    assert all(right(engine) for engine in engines)


def test_the_last_reader_awake_ends(store, process):
    """The model leaves the device: a sleeper can publish it again."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    other.kill()
    wait_until(lambda: resident(store) == 0, "the device to be empty")
    assert one.wake() == [before, 0]
    assert right(one)


def test_a_pinned_model_stays_on_the_device(store, process):
    """Although its only reader sleeps."""
    (engine,) = published(process)
    before = resident(store)
    engine.pin(key=KEY)
    engine.sleep()
    assert resident(store) == before
    assert engine.wake() == [before, 0]


def test_a_host_copy_without_readers_does_not_remove_the_model(store, process):
    """When all readers are awake and end, the model stays resident."""
    one, other = published(process, 2)
    before = resident(store)
    one.sleep()
    one.wake()
    one.kill()
    other.kill()
    wait_until(lambda: set(readers(store).values()) == {0}, "both to end")
    assert resident(store) == before


def test_a_new_engine_publishes_while_others_sleep(store, process):
    """Its layout is the former one, so the sleeper shares the model when it wakes."""
    (engine,) = published(process)
    before = resident(store)
    engine.sleep()
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"
    assert engine.wake() == [before, 0]
    assert right(engine)


def test_another_layout(store, process):
    """A model published with another layout: private memory with the right bytes, counted; shared on the next wake."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, MIB]])
    (engine,) = published(process)
    addresses, whole = engine.addresses(), resident(store)
    engine.sleep()
    assert resident(store) < whole
    other.leave(key=key(2))
    other.remove(key=key(2))
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"  # the third blob is now in the same segment as the others
    shared, private = engine.wake()
    assert private > 0
    assert engine.addresses() == addresses
    assert right(engine)
    counters = store.status().counters
    assert counters.fallbacks == 1
    mine = [client for client in store.status().clients if client.name == "engine 0" and client.key]
    assert [client.private_bytes for client in mine] == ([private] if shared else [])
    engine.sleep()
    fresh.leave(key=KEY)
    fresh.kill()
    wait_until(lambda: resident(store) == 0, "the device to be empty")
    assert engine.wake()[1] == 0
    assert right(engine)


def test_a_blob_that_another_model_has(process):
    """A blob has another location by now: its former segment is published completely, and all of it is shared."""
    (engine,) = published(process)
    engine.sleep()
    other = process("other")
    other.publish(key=key(2), model=[[2, 3 * MIB]])
    shared, private = engine.wake()
    assert private == 0
    assert shared > 0
    assert right(engine)
    late = process("late")
    assert late.open(key=KEY, publish=False) == "attached"
    assert right(late)


def test_no_memory_for_the_host_copy(start, process_of):
    """Sleeping is refused, and the engine stays awake."""
    store = start(max_resident={"cpu": 2 * MIB})
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    before = store.status().models
    with pytest.raises(OutOfMemoryError, match="max-resident"):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)
    after = store.status().models
    assert [(model.key, model.readers) for model in after] == [(model.key, model.readers) for model in before]


def test_no_memory_to_wake(start, process_of):
    """Waking raises and maps nothing. It succeeds once another model can be evicted."""
    store = start(max_resident={DEVICE: 80 * MIB})
    engine, other = process_of(), process_of()
    engine.publish(key=KEY, model=MODEL)
    engine.sleep()
    other.publish(key=key(2), model=[[7, 40 * MIB]])
    with pytest.raises(OutOfMemoryError):
        engine.wake()
    assert engine.mapped() == 0
    other.leave(key=key(2))  # can be evicted now
    assert engine.wake()[1] == 0
    assert right(engine)
    assert store.status().counters.fallbacks == 0


def test_a_reader_that_wrote_cannot_sleep(process):
    """Its private pages would be lost."""
    (engine,) = published(process)
    engine.write(index=0, text="mine")
    with pytest.raises(UnsupportedError, match="wrote"):
        engine.sleep()
    assert engine.mapped() == 2


def test_waking_after_prepare_leaves_the_host_copy(store, process):
    """A process that prepared to sleep and stayed awake is not a reader of the host copy any more."""
    (engine,) = published(process)
    engine.prepare()
    assert [n for (device, _), n in readers(store).items() if device == "cpu"] == [1]
    assert engine.wake() == [resident(store), 0]
    assert [n for (device, _), n in readers(store).items() if device == "cpu"] == [0]


def test_wrong_bytes_on_the_device(store, process, directory):
    """The store refuses the host copy, and the process stays awake."""
    from support.saved import turn_a_bit

    from shared_store.base.errors import DigestMismatchError
    from shared_store.memory import backend_for

    (engine,) = published(process)
    turn_a_bit(directory, KEY, backend=backend_for(DEVICE))
    with pytest.raises(DigestMismatchError):
        engine.sleep()
    assert engine.mapped() == 2
    assert not [model for model in store.status().models if model.device == "cpu"]


def test_an_impossible_preferred_layout(store):
    """It is refused, and the publisher can plan without it."""
    from shared_store.base.errors import ProtocolError
    from shared_store.protocol.messages import BlobPlace

    client = store.client()
    assert client.open(KEY) == "granted"
    blobs = [Blob(bytes([number]) * 32, 1000) for number in range(2)]
    with pytest.raises(ProtocolError, match="preferred layout"):
        client.session.plan(KEY, blobs, wish=[BlobPlace(0, 0), BlobPlace(0, 512)], sizes=[2 * MIB])
    with pytest.raises(ProtocolError, match="preferred layout"):
        client.session.plan(KEY, blobs, wish=[BlobPlace(0, 0)], sizes=[2 * MIB])
    planned, _ = client.session.plan(KEY, blobs)
    assert len(planned.segments) == 1


def test_the_key_of_a_host_copy():
    """It depends on the model's key and on the blobs."""
    keys = {host_key(KEY, [b"a" * 32]), host_key(KEY, [b"b" * 32]), host_key(key(2), [b"a" * 32])}
    assert len(keys) == 3
    assert all(map(is_key, keys))
