"""Who sleeps holds no memory of the device; who wakes has the same bytes at the same addresses, shared if it can be."""

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
"""Two segments: 64 MiB and what is over; a blob twice; one without bytes."""


def resident(kept, device=DEVICE):
    return next((one.resident_bytes for one in kept.status().devices if one.id == device), 0)


def readers(kept):
    return {(one.device, one.key): one.readers for one in kept.status().models}


def published(process, count=1, model=MODEL):
    """Processes that have a model mapped, the first of which published it."""
    made = [process(f"engine {number}") for number in range(count)]
    for one in made:
        one.publish(key=KEY, model=model)
    return made


def right(one):
    return one.digests() == one.expected()


def test_one_engine_many_times(kept, process):
    """The device is empty while it sleeps; addresses, bytes, fds and the store's memory are the same each time."""
    (engine,) = published(process)
    before, addresses = resident(kept), engine.addresses()
    seen = []
    for _ in range(20):
        engine.sleep()
        assert engine.mapped() == 0
        assert resident(kept) == 0
        seen.append((resident(kept, "cpu"), open_segments(engine.pid), open_segments(kept.store_pid)))
        assert engine.wake() == [before, 0]
        assert engine.addresses() == addresses
        assert right(engine)
        assert resident(kept) == before
    assert len(set(seen)) == 1
    status = kept.status()
    assert status.counters.fallbacks == 0
    assert [model.readers for model in status.models if model.device == DEVICE] == [1]


def test_nothing_is_left_of_a_sleeper(process):
    """Its fds are those of before, once it is awake."""
    (engine,) = published(process)
    before = open_fds(engine.pid)
    engine.sleep()
    engine.wake()
    assert open_fds(engine.pid) == before


def test_one_sleeps_and_one_works(kept, process):
    """The model stays for the one; the other comes back to it without anything being copied."""
    one, other = published(process, 2)
    before = resident(kept)
    one.sleep()
    assert resident(kept) == before
    assert right(other)
    assert one.wake() == [before, 0]
    assert right(one)
    assert kept.status().counters.publishes == 2  # the model, and its host copy


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_sleep_and_wake_in_either_order(kept, process, order):
    """The device is empty when both sleep, they have one host copy, and share again when they wake."""
    engines = published(process, 2)
    before = resident(kept)
    for engine in engines:
        engine.sleep()
    assert resident(kept) == 0
    host = [model for model in kept.status().models if model.device == "cpu"]
    assert [(model.readers, model.name) for model in host] == [(2, "model (host copy)")]
    for number in order:
        assert engines[number].wake() == [before, 0]
        assert resident(kept) == before
    assert all(right(engine) for engine in engines)
    assert [n for (device, _), n in readers(kept).items() if device == DEVICE] == [2]


def test_both_wake_at_once(kept, process):
    """One of them publishes, the other waits for that and shares it."""
    engines = published(process, 2)
    before = resident(kept)
    for engine in engines:
        engine.sleep()
    publishes = kept.status().counters.publishes
    for engine in engines:
        engine.begin("wake")
    assert [engine.finish() for engine in engines] == [[before, 0]] * 2
    assert resident(kept) == before
    assert kept.status().counters.publishes == publishes + 1
    assert all(right(engine) for engine in engines)


def test_the_last_one_awake_leaves(kept, process):
    """What sleepers will bring back need not stay on the device."""
    one, other = published(process, 2)
    before = resident(kept)
    one.sleep()
    other.kill()
    wait_until(lambda: resident(kept) == 0, "the device to be empty")
    assert one.wake() == [before, 0]
    assert right(one)


def test_a_pinned_model_stays(kept, process):
    """Pinned is pinned, asleep or not."""
    (engine,) = published(process)
    before = resident(kept)
    engine.pin(key=KEY)
    engine.sleep()
    assert resident(kept) == before
    assert engine.wake() == [before, 0]


def test_without_sleepers_a_model_stays_as_a_cache(kept, process):
    """A host copy that nobody reads changes nothing for those who leave."""
    one, other = published(process, 2)
    before = resident(kept)
    one.sleep()
    one.wake()
    one.kill()
    other.kill()
    wait_until(lambda: set(readers(kept).values()) == {0}, "both to be gone")
    assert resident(kept) == before


def test_a_new_engine_publishes_while_others_sleep(kept, process):
    """It loads as ever, the blobs lie as before, and the sleeper shares them."""
    (engine,) = published(process)
    before = resident(kept)
    engine.sleep()
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"
    assert engine.wake() == [before, 0]
    assert right(engine)


def test_another_layout(kept, process):
    """Another process laid it out otherwise meanwhile: right bytes in own memory, counted; shared again later."""
    other = process("other")
    other.publish(key=key(2), model=[[3, 30 * MIB], [9, MIB]])
    (engine,) = published(process)
    addresses, whole = engine.addresses(), resident(kept)
    engine.sleep()
    assert resident(kept) < whole
    other.leave(key=key(2))
    other.remove(key=key(2))
    fresh = process("fresh")
    assert fresh.publish(key=KEY, model=MODEL) == "granted"  # with the third blob beside the others now
    shared, private = engine.wake()
    assert private > 0
    assert engine.addresses() == addresses
    assert right(engine)
    counters = kept.status().counters
    assert counters.fallbacks == 1
    mine = [one for one in kept.status().clients if one.name == "engine 0" and one.key]
    assert [one.private_bytes for one in mine] == ([private] if shared else [])
    engine.sleep()
    fresh.leave(key=KEY)
    fresh.kill()
    wait_until(lambda: resident(kept) == 0, "the device to be empty")
    assert engine.wake()[1] == 0
    assert right(engine)


def test_a_blob_that_another_model_has(process):
    """Part of a segment lies elsewhere by now: it is published as it was, and this process has all of it shared."""
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


def test_no_room_for_the_host_copy(start, process_of):
    """Sleeping is refused, and the engine is as it was."""
    kept = start(max_resident={"cpu": 2 * MIB})
    engine = process_of()
    engine.publish(key=KEY, model=MODEL)
    before = kept.status().models
    with pytest.raises(OutOfMemoryError, match="max-resident"):
        engine.sleep()
    assert engine.mapped() == 2
    assert right(engine)
    assert [(one.key, one.readers) for one in kept.status().models] == [(one.key, one.readers) for one in before]


def test_no_room_to_wake(start, process_of):
    """The error is raised, nothing is mapped, and once there is room it wakes."""
    kept = start(max_resident={DEVICE: 80 * MIB})
    engine, other = process_of(), process_of()
    engine.publish(key=KEY, model=MODEL)
    engine.sleep()
    other.publish(key=key(2), model=[[7, 40 * MIB]])
    with pytest.raises(OutOfMemoryError):
        engine.wake()
    assert engine.mapped() == 0
    other.leave(key=key(2))  # is a cache now, and leaves when room is needed
    assert engine.wake()[1] == 0
    assert right(engine)
    assert kept.status().counters.fallbacks == 0


def test_written_pages_are_not_lost(process):
    """Where a reader can write, what it wrote would not come back: refused."""
    (engine,) = published(process)
    engine.write(index=0, text="mine")
    with pytest.raises(UnsupportedError, match="wrote"):
        engine.sleep()
    assert engine.mapped() == 2


def test_prepared_and_not_needed(kept, process):
    """Whoever prepared to sleep and stays awake reads the host copy no more after waking up."""
    (engine,) = published(process)
    engine.prepare()
    assert [n for (device, _), n in readers(kept).items() if device == "cpu"] == [1]
    assert engine.wake() == [resident(kept), 0]
    assert [n for (device, _), n in readers(kept).items() if device == "cpu"] == [0]


def test_wrong_bytes_on_the_device(kept, process, directory):
    """What the store would not take as a host copy is not slept on."""
    from support.saved import turn_a_bit

    from shared_store.base.errors import DigestMismatchError
    from shared_store.memory import backend_for

    (engine,) = published(process)
    turn_a_bit(directory, KEY, backend=backend_for(DEVICE))
    with pytest.raises(DigestMismatchError):
        engine.sleep()
    assert engine.mapped() == 2
    assert not [one for one in kept.status().models if one.device == "cpu"]


def test_a_wish_that_cannot_be(kept):
    """It is refused, and the publisher may plan without it."""
    from shared_store.base.errors import ProtocolError
    from shared_store.protocol.messages import BlobPlace

    client = kept.client()
    assert client.open(KEY) == "granted"
    blobs = [Blob(bytes([number]) * 32, 1000) for number in range(2)]
    with pytest.raises(ProtocolError, match="wish"):
        client.session.plan(KEY, blobs, wish=[BlobPlace(0, 0), BlobPlace(0, 512)], sizes=[2 * MIB])
    with pytest.raises(ProtocolError, match="wish"):
        client.session.plan(KEY, blobs, wish=[BlobPlace(0, 0)], sizes=[2 * MIB])
    planned, _ = client.session.plan(KEY, blobs)
    assert len(planned.segments) == 1


def test_the_host_copys_key_is_its_contents():
    """Neither another model's blobs nor another key share it."""
    keys = {host_key(KEY, [b"a" * 32]), host_key(KEY, [b"b" * 32]), host_key(key(2), [b"a" * 32])}
    assert len(keys) == 3
    assert all(map(is_key, keys))
