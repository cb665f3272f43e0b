"""Asleep, a process uses no device memory; awake, it has the same bytes at the same addresses, shared if possible."""

from __future__ import annotations

import pytest
from support.content import key
from support.devices import DEVICE
from support.waiting import open_fds, open_segments, wait_until

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, OutOfMemoryError, UnsupportedError
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


def away(store):
    """Return the number of readers of each model that sleep, by device and key."""
    return {(model.device, model.key): model.away for model in store.status().models}


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
    counters = status.counters
    assert (counters.fallbacks, counters.evictions, counters.publishes) == (0, 0, 1)
    assert (counters.sleeps, counters.wakes, counters.returns) == (20, 20, 20)
    assert [(model.device, model.readers, model.away) for model in status.models] == [(DEVICE, 1, 0)]


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
    counters = store.status().counters
    assert (counters.publishes, counters.returns, counters.sleeps, counters.wakes) == (1, 0, 1, 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_sleep_and_wake_in_either_order(store, process, order):
    """The device is empty while both sleep; they share host copies, and the model when they wake."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    assert resident(store) == 0
    status = store.status()
    (model,) = status.models
    assert (model.readers, model.away, model.resident_bytes, model.host_bytes) == (0, 2, 0, model.bytes)
    assert resident(store, "cpu") == before
    assert [client.away for client in status.clients if client.key] == [True, True]
    assert status.counters.evictions == 0
    for number in order:
        assert engines[number].wake() == [before, 0]
        assert resident(store) == before
    assert all(right(engine) for engine in engines)
    assert [n for (device, _), n in readers(store).items() if device == DEVICE] == [2]


def test_both_wake_at_once(store, process):
    """One of them fills the device; the other waits and attaches."""
    engines = published(process, 2)
    before = resident(store)
    for engine in engines:
        engine.sleep()
    for engine in engines:
        engine.begin("wake")
    assert [engine.finish() for engine in engines] == [[before, 0]] * 2
    assert resident(store) == before
    counters = store.status().counters
    assert (counters.publishes, counters.returns, counters.wakes) == (1, 1, 2)
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


def test_an_unpinned_model_leaves_the_device(store, process):
    """Its only reader sleeps already."""
    (engine,) = published(process)
    engine.pin(key=KEY)
    engine.sleep()
    engine.pin(key=KEY, pinned=False)
    assert resident(store) == 0


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
    """It fills the segments that left, so the sleeper shares the model when it wakes."""
    (engine,) = published(process)
    before = resident(store)
    engine.sleep()
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"
    assert right(fresh)
    assert resident(store) == before
    assert (store.status().counters.publishes, store.status().counters.returns) == (1, 1)
    assert engine.wake() == [before, 0]
    assert resident(store) == before
    assert right(engine)


def test_another_layout(store, process):
    """A client of an earlier version published the model with another layout: private memory, counted; shared later."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, MIB]])
    (engine,) = published(process)
    addresses, whole = engine.addresses(), resident(store)
    engine.sleep()
    assert resident(store) < whole
    other.leave(key=key(2))
    assert resident(store) == 0
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"  # without the other's blob, so the third one moves
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
    assert store.status().counters.evictions == 0


def test_a_segment_returns_whole(store, process):
    """A publisher writes the blobs of other models in it, too: it stays in one piece for those that sleep with it."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, MIB]])
    one, two = published(process, 2)
    addresses, before = one.addresses(), resident(store)
    other.sleep()
    one.sleep()
    two.sleep()
    assert resident(store) == 0
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL, whole=True) == "granted"
    assert resident(store) == before
    assert one.wake()[1] == two.wake()[1] == other.wake()[1] == 0
    assert one.addresses() == addresses
    assert all(right(engine) for engine in (fresh, one, two, other))
    assert resident(store) == before
    assert store.status().counters.fallbacks == 0


def test_models_that_share_a_segment_wake_at_once(store, process):
    """Each waits for what the other brings back."""
    one, other = process("one"), process("other")
    one.publish(key=KEY, model=MODEL)
    other.publish(key=key(2), model=[MODEL[0], [7, 5 * MIB]])
    before = resident(store)
    for _ in range(5):
        one.sleep()
        other.sleep()
        for engine in (one, other):
            engine.begin("wake")
        assert one.finish()[1] == other.finish()[1] == 0
        assert right(one)
        assert right(other)
        assert resident(store) == before


@pytest.mark.parametrize("asleep", [False, True])
def test_compaction_moves_nothing_that_a_sleeper_will_map(store, process, asleep):
    """Whether its segments are on the device or not, and although they have dead bytes."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, 20 * MIB]])
    (engine,) = published(process)
    addresses = engine.addresses()
    if not asleep:
        engine.pin(key=KEY)
    engine.sleep()
    other.leave(key=key(2))
    other.remove(key=key(2))
    assert engine.compact(device=DEVICE)["freed_bytes"] == 0
    assert store.status().counters.compactions == 0
    if not asleep:
        engine.pin(key=KEY, pinned=False)
    assert engine.wake()[1] == 0
    assert engine.addresses() == addresses
    assert right(engine)


def test_a_blob_that_moved_returns_to_host_memory(store, process):
    """A publisher that ended moved it to a segment without a host copy: that segment leaves, and the model is whole."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, MIB]])
    (engine,) = published(process)
    before = resident(store)
    engine.sleep()
    other.leave(key=key(2))
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"
    fresh.kill()
    wait_until(lambda: resident(store) == 0, "the device to be empty")
    assert {model.key: (model.resident_bytes, model.host_bytes == model.bytes) for model in store.status().models} == {
        KEY: (0, True),
        key(2): (0, True),
    }
    assert engine.wake()[1] == 0
    assert right(engine)
    assert resident(store) <= before
    late = process("late")
    assert late.open(key=KEY, publish=False) == "attached"
    assert right(late)


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


def test_no_memory_for_the_host_copy(start, process_of, tmp_path):
    """Without a swap directory sleeping is refused, and the engine stays awake."""
    store = start(max_resident={"cpu": 2 * MIB}, swap_dir=str(tmp_path / "absent"))
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    before = store.status().models
    with pytest.raises(OutOfMemoryError, match=r"WOOLY_HOST_BUDGET.*WOOLY_SWAP_DIR"):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)
    after = store.status().models
    assert [(model.key, model.readers) for model in after] == [(model.key, model.readers) for model in before]


def test_spare_host_copies_give_way(start, process_of):
    """Host copies of models that are awake are dropped for others, without an eviction; those of sleepers stay."""
    store = start(max_resident={"cpu": 120 * MIB})
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    engine.sleep()
    engine.wake()
    assert resident(store, "cpu") > 60 * MIB
    client = store.client()
    client.publish(key(3), [[8, 100 * MIB]])
    assert resident(store, "cpu") == 100 * MIB
    assert store.status().counters.evictions == 0
    client.leave(key(3))
    engine.sleep()  # evicts the model without readers
    assert store.status().counters.evictions == 1
    assert client.open(key(3)) == "granted"
    with pytest.raises(OutOfMemoryError):
        client.plan(key(3), [[8, 100 * MIB]])
    assert engine.wake()[1] == 0
    assert right(engine)


def test_an_idle_model_in_host_memory_is_evicted(start, process_of):
    """When its last sleeper ends, its host copies are a cache like any other."""
    store = start(max_resident={"cpu": 120 * MIB})
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    engine.sleep()
    engine.kill()
    wait_until(lambda: list(away(store).values()) == [0], "it to end")
    assert resident(store, "cpu") > 60 * MIB
    client = store.client()
    client.publish(key(3), [[8, 100 * MIB]])
    assert [model.key for model in store.status().models] == [key(3)]
    assert store.status().counters.evictions == 1


def test_both_fall_asleep_at_once(store, process):
    """One of them makes the host copies, and the other waits for them."""
    engines = published(process, 2, [*MODEL, [6, 100 * MIB]])
    before = resident(store)
    for engine in engines:
        engine.begin("sleep")
    for engine in engines:
        engine.finish()
    assert (resident(store), resident(store, "cpu")) == (0, before)
    assert [engine.wake() for engine in engines] == [[before, 0]] * 2
    assert all(right(engine) for engine in engines)


def test_a_sleeping_model_is_not_removed(store, process):
    """Its readers sleep, but need it; it can be removed when they have ended."""
    (engine,) = published(process)
    engine.sleep()
    client = store.client()
    with pytest.raises(ModelInUseError, match="1 of them asleep"):
        client.remove(KEY)
    engine.kill()
    wait_until(lambda: list(away(store).values()) == [0], "it to end")
    client.remove(KEY)
    assert (resident(store), resident(store, "cpu")) == (0, 0)


def test_models_that_share_a_segment(store, process):
    """A segment leaves when the readers of all models in it are away, and returns with the blobs of all."""
    one, other = process("one"), process("other")
    one.publish(key=KEY, model=MODEL)
    other.publish(key=key(2), model=[MODEL[0], [7, 5 * MIB]])
    before = resident(store)
    other.sleep()
    assert resident(store) == before - 6 * MIB  # what `one` does not read
    one.sleep()
    assert resident(store) == 0
    assert other.wake()[1] == 0
    assert right(other)
    assert one.wake()[1] == 0
    assert right(one)
    one.sleep()
    other.sleep()
    assert resident(store) == 0
    assert one.wake()[1] == other.wake()[1] == 0
    assert right(one)
    assert right(other)


def test_a_cached_model_follows_its_segment_to_host_memory(store, process):
    """A model without readers shares a segment with one that sleeps: its next reader fills the device again."""
    one, other = process("one"), process("other")
    one.publish(key=KEY, model=MODEL)
    other.publish(key=key(2), model=[MODEL[0], [7, 5 * MIB]])
    other.leave(key=key(2))
    one.sleep()
    assert resident(store) == 6 * MIB
    with pytest.raises(ModelNotFoundError, match="host memory only"):
        other.open(key=key(2), publish=False)
    assert other.publish(key=key(2), model=[MODEL[0], [7, 5 * MIB]]) == "granted"
    assert right(other)
    assert one.wake()[1] == 0
    assert right(one)


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
    assert resident(store, "cpu") == resident(store)
    assert engine.wake() == [resident(store), 0]
    assert (readers(store), away(store)) == ({(DEVICE, KEY): 1}, {(DEVICE, KEY): 0})


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
    assert resident(store, "cpu") == 0


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
