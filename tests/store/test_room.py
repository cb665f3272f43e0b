"""Models that nobody reads are a cache: they leave when room is needed, and only then."""

from __future__ import annotations

import pytest
from support.content import key
from support.served import ServedStore
from support.stores import resident

from shared_store.base.errors import ModelNotFoundError, OutOfMemoryError
from shared_store.memory.fake import FakeBackend

MIB = 1 << 20


def model(seed):
    """Takes a segment of 4 MiB."""
    return [[seed, 3 * MIB]]


def cache(client, *numbers):
    """Publish models, which nobody reads then."""
    for number in numbers:
        client.publish(key=key(number), model=model(number))
        client.leave(key=key(number))


def there(client):
    return {one.key for one in client.session.status().models}


@pytest.fixture
def small(start_store):
    """A store with room for two of the models."""
    return start_store(max_resident={"cpu": 8 * MIB})


def test_the_least_recently_used_leaves(small, actor):
    """Having read a model again counts, and what is published is whole."""
    client, process = small.client(), actor()
    cache(process, 1, 2)
    assert process.open(key=key(1)) == "attached"
    process.leave(key=key(1))
    process.publish(key=key(3), model=model(3))
    assert process.digests() == process.expected()
    assert there(client) == {key(1), key(3)}
    assert resident(client) == 8 * MIB
    assert client.session.status().counters.evictions == 1


def test_what_is_read_stays(small, actor):
    """Though it was used before the other one."""
    client, reader, process = small.client(), actor(), actor()
    reader.publish(key=key(1), model=model(1))
    cache(process, 2)
    process.publish(key=key(3), model=model(3))
    assert there(client) == {key(1), key(3)}
    assert reader.digests() == reader.expected()


def test_what_is_pinned_stays_until_it_is_unpinned(small, actor):
    """And nothing else is dropped where that would not be enough; the error says what is pinned, and what to do."""
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
    assert there(client) == {key(3)}


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
    assert there(client) == {key(1), key(3)}
    client.remove(key(1))  # by hand, it goes
    with pytest.raises(ModelNotFoundError):
        client.pin(key(1))


def test_more_than_the_limit_drops_nothing(small, actor):
    """A cache is not thrown away in vain."""
    client, process = small.client(), actor()
    cache(process, 1, 2)
    process.open(key=key(3))
    with pytest.raises(OutOfMemoryError):
        process.plan(key=key(3), model=[[3, 9 * MIB]])
    assert there(client) == {key(1), key(2), key(3)}


def test_what_a_plan_counts_on_stays_though_its_model_leaves(small, actor):
    """The blob is in the store once, before and after."""
    client, process = small.client(), actor()
    cache(process, 1, 2)
    process.open(key=key(3))
    assert process.plan(key=key(3), model=[*model(1), [3, 3 * MIB]]) == [False, True]
    process.fill(key=key(3))
    process.unmap()
    process.commit(key=key(3))
    assert process.digests() == process.expected()
    assert there(client) == {key(1), key(3)}  # dropping model 1, older than model 2, would have freed nothing
    assert resident(client) == 8 * MIB


def test_the_device_is_full(directory):
    """There is no limit, but memory has an end: the same models leave, and the event says why."""
    with ServedStore(directory, FakeBackend("cpu", capacity=9 * MIB)) as served:
        client = served.client()
        cache(client, 1, 2)
        client.publish(key(3), model(3))
        assert client.digests() == client.expected()
        assert there(client) == {key(2), key(3)}
        evicted = {"key": key(1), "name": "model", "bytes": 3 * MIB, "reason": "device full"}
        assert [fields for kind, fields in served.events if kind == "evicted"] == [evicted]
        other = served.client()
        other.open(key(4))
        other.plan(key(4), [[4, 7 * MIB]])
        with pytest.raises(OutOfMemoryError, match=r"in use: model .*; not enough: model .*; stop a reader"):
            other.fill(key(4))
        assert there(client) == {key(2), key(3), key(4)}


def test_a_store_that_was_just_restarted_drops_nothing(directory):
    """Its readers may be on their way back; the error says to try again."""
    with ServedStore(directory, FakeBackend("cpu"), limit=8 * MIB) as served:
        client = served.client()
        cache(client, 1, 2)
        served.parts.state.grace.until = float("inf")
        client.open(key(3))
        with pytest.raises(OutOfMemoryError, match="was just restarted and evicts nothing yet: try again"):
            client.plan(key(3), model(3))
        assert there(client) == {key(1), key(2), key(3)}
        assert client.compact()["segments"] == 0
        served.parts.state.grace.until = 0.0
        client.plan(key(3), model(3))
        assert there(client) == {key(2), key(3)}
