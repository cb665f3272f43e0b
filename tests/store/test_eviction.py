"""Models without readers are a cache: they are evicted when memory is needed, and only then."""

from __future__ import annotations

import pytest
from support.content import key
from support.devices import Unmeasured
from support.served import ServedStore
from support.stores import resident

from shared_store.base.errors import ModelNotFoundError, OutOfMemoryError
from shared_store.memory.fake import FakeBackend

MIB = 1 << 20


def model(seed):
    """Blobs that need a segment of 4 MiB."""
    return [[seed, 3 * MIB]]


def cache(client, *numbers):
    """Publish models, and leave them without readers."""
    for number in numbers:
        client.publish(key=key(number), model=model(number))
        client.leave(key=key(number))


def keys(client):
    return {one.key for one in client.session.status().models}


@pytest.fixture
def small(start_store):
    """A store whose limit is two of the models."""
    return start_store(max_resident={"cpu": 8 * MIB})


def test_the_least_recently_used_model_is_evicted(small, actor):
    """Reading a model again is a use, and the new model is complete."""
    client, process = small.client(), actor()
    cache(process, 1, 2)
    assert process.open(key=key(1)) == "attached"
    process.leave(key=key(1))
    process.publish(key=key(3), model=model(3))
    assert process.digests() == process.expected()
    assert keys(client) == {key(1), key(3)}
    assert resident(client) == 8 * MIB
    assert client.session.status().counters.evictions == 1


def test_a_model_with_readers_is_not_evicted(small, actor):
    """Although it was used less recently than the other."""
    client, reader, process = small.client(), actor(), actor()
    reader.publish(key=key(1), model=model(1))
    cache(process, 2)
    process.publish(key=key(3), model=model(3))
    assert keys(client) == {key(1), key(3)}
    assert reader.digests() == reader.expected()


def test_a_pinned_model_is_not_evicted_until_it_is_unpinned(small, actor):
    """No other model is evicted if that would not free enough; the error lists the pinned models and the next steps."""
    client, process = small.client(), actor()
    cache(process, 1, 2)
    assert client.pin("0" * 63 + "1") == key(1)
    process.open(key=key(3))
    with pytest.raises(OutOfMemoryError) as caught:
        process.plan(key=key(3), model=[[3, 3 * MIB], [4, 3 * MIB]])
    assert str(caught.value) == (
        "not enough memory on cpu: 6291456 bytes are needed, 0 of the limit of 8388608 are free; "
        "pinned: model (3145728 bytes); "
        "not enough: model (3145728 bytes); stop a reader (`wooly status`), unpin a model (`wooly unpin KEY`), "
        "or raise --max-resident"
    )
    assert {one.key: one.pinned for one in client.session.status().models if one.key != key(3)} == {
        key(1): True,
        key(2): False,
    }
    client.pin(key(1), pinned=False)
    process.plan(key=key(3), model=[[3, 3 * MIB], [4, 3 * MIB]])
    assert keys(client) == {key(3)}


def test_a_model_that_is_being_published_can_be_pinned(small, actor):
    client, process = small.client(), actor()
    process.open(key=key(1))
    client.pin(key(1))
    process.plan(key=key(1), model=model(1))
    process.fill(key=key(1))
    process.unmap()
    process.commit(key=key(1))
    process.leave(key=key(1))
    cache(process, 2)
    process.publish(key=key(3), model=model(3))
    assert keys(client) == {key(1), key(3)}
    client.remove(key(1))  # a pinned model can be removed
    with pytest.raises(ModelNotFoundError):
        client.pin(key(1))


def test_a_plan_above_the_limit_evicts_nothing(small, actor):
    client, process = small.client(), actor()
    cache(process, 1, 2)
    process.open(key=key(3))
    with pytest.raises(OutOfMemoryError):
        process.plan(key=key(3), model=[[3, 9 * MIB]])
    assert keys(client) == {key(1), key(2), key(3)}


def test_blobs_that_a_plan_counts_on_outlive_their_model(small, actor):
    """The blob is in the store once, before and after the eviction."""
    client, process = small.client(), actor()
    cache(process, 1, 2)
    process.open(key=key(3))
    assert process.plan(key=key(3), model=[*model(1), [3, 3 * MIB]]) == [False, True]
    process.fill(key=key(3))
    process.unmap()
    process.commit(key=key(3))
    assert process.digests() == process.expected()
    assert keys(client) == {key(1), key(3)}  # evicting model 1, used before model 2, would have freed nothing
    assert resident(client) == 8 * MIB


def test_where_free_memory_is_unknown_no_more_models_are_evicted_than_are_needed(directory):
    """5 MiB are free and 8 are needed: one of the models suffices."""
    device = Unmeasured("cpu")
    device.capacity = 13 * MIB
    with ServedStore(directory, device) as served:
        client = served.client()
        cache(client, 1, 2)
        client.publish(key(3), [[3, 7 * MIB]])
        assert client.digests() == client.expected()
        assert keys(client) == {key(2), key(3)}


def test_a_full_device_evicts_models(directory):
    """Without a limit, the same models are evicted, and the event has the reason."""
    with ServedStore(directory, FakeBackend("cpu", capacity=9 * MIB)) as served:
        client = served.client()
        cache(client, 1, 2)
        client.publish(key(3), model(3))
        assert client.digests() == client.expected()
        assert keys(client) == {key(2), key(3)}
        evicted = {"key": key(1), "name": "model", "bytes": 3 * MIB, "reason": "device full"}
        assert [fields for kind, fields in served.events if kind == "evicted"] == [evicted]
        other = served.client()
        other.open(key(4))
        other.plan(key(4), [[4, 7 * MIB]])
        with pytest.raises(OutOfMemoryError, match=r"in use: model .*; not enough: model .*; stop a reader"):
            other.fill(key(4))
        assert keys(client) == {key(2), key(3), key(4)}


def test_a_restarted_store_evicts_nothing_during_the_grace_period(directory):
    """Readers may rejoin; the error says to try again."""
    with ServedStore(directory, FakeBackend("cpu"), limit=8 * MIB) as served:
        client = served.client()
        cache(client, 1, 2)
        served.parts.state.grace.until = float("inf")
        client.open(key(3))
        with pytest.raises(OutOfMemoryError, match="was just restarted and evicts nothing yet: try again"):
            client.plan(key(3), model(3))
        assert keys(client) == {key(1), key(2), key(3)}
        assert client.compact()["segments"] == 0
        served.parts.state.grace.until = 0.0
        client.plan(key(3), model(3))
        assert keys(client) == {key(2), key(3)}
