"""A hundred models, 27,030 blobs and a hundred clients: every number is exact, before and after the store is killed."""

from __future__ import annotations

import itertools

import pytest
from support.client import Client
from support.content import key
from support.waiting import wait_until

MODELS = 100
BLOBS = 300
COMMON = 30
NBYTES = 512
OWN = BLOBS - COMMON


def content_of(model):
    """Blobs of a model: the first 30 are the last of the model before it."""
    return [[seed, NBYTES] for seed in range(model * OWN, model * OWN + BLOBS)]


def unique_of(model):
    return (BLOBS - COMMON * ((model > 0) + (model < MODELS - 1))) * NBYTES


@pytest.fixture
def readers(kept):
    """A client for each model, which published it and reads it."""
    clients = []
    for model in range(MODELS):
        clients.append(Client(kept.directory, f"reader {model}"))
        assert clients[-1].publish(key(model), content_of(model)) == "granted"
    yield clients
    for client in clients:
        client.unmap_all()
        client.close()


def expect_all(status):
    """Every model has its one reader, and sums are those of distinct blobs."""
    assert [(one.key, one.unique_bytes, one.readers) for one in sorted(status.models, key=lambda one: one.key)] == [
        (key(model), unique_of(model), 1) for model in range(MODELS)
    ]
    reading = [client for client in status.clients if client.role == "reader"]
    assert sorted((client.name, client.key) for client in reading) == sorted(
        (f"reader {model}", key(model)) for model in range(MODELS)
    )
    mapped, distinct = MODELS * BLOBS * NBYTES, (MODELS * OWN + COMMON) * NBYTES
    assert (status.totals.mapped_bytes, status.totals.saved_bytes) == (mapped, mapped - distinct)
    (device,) = status.devices
    assert (device.segments, device.resident_bytes) == (MODELS, MODELS * (2 << 20))
    assert (device.dead_bytes, device.padding_bytes) == (0, MODELS * (2 << 20) - distinct)
    assert 0 < status.loop.callbacks.longest_s <= status.loop.callbacks.total_s


def test_counts_are_exact_over_kills_and_to_the_last_segment(kept, readers):
    expect_all(kept.status())
    assert kept.status().counters.publishes == MODELS

    pid = kept.kill_store()
    wait_until(lambda: kept.store_pid != pid, "another store")
    wait_until(lambda: all(model.readers for model in kept.status().models), "all clients to rejoin")
    expect_all(kept.status())
    assert all(client.digests() == client.expected() for client in readers[:: MODELS // 5])

    half = readers[::2]
    for client in half:
        client.unmap_all()
        client.close()
    wait_until(lambda: sum(model.readers for model in kept.status().models) == MODELS // 2, "leases to end")
    with_readers = {model.key for model in kept.status().models if model.readers}
    assert with_readers == {key(model) for model in range(1, MODELS, 2)}
    assert {client.key for client in kept.status().clients if client.role == "reader"} == with_readers

    for client in readers[1::2]:
        client.unmap_all()
        client.close()
    wait_until(lambda: not any(model.readers for model in kept.status().models), "leases to end")
    administrator = Client(kept.directory, "administrator")
    order = itertools.chain(range(0, MODELS, 3), range(1, MODELS, 3), range(2, MODELS, 3))
    for left, model in zip(range(MODELS - 1, -1, -1), order, strict=True):
        assert administrator.remove(key(model)) == key(model)
        if left % 20 == 0:
            status = kept.status()
            assert len(status.models) == left
            assert all(one.unique_bytes >= (BLOBS - 2 * COMMON) * NBYTES for one in status.models)
    administrator.close()
    (device,) = kept.status().devices
    assert (device.segments, device.resident_bytes, device.dead_bytes, device.padding_bytes) == (0, 0, 0, 0)


def test_a_model_of_very_many_blobs_is_published_and_read(kept):
    """Its manifest is decoded in a thread of the store."""
    publisher, reader = Client(kept.directory, "publisher"), Client(kept.directory, "reader")
    model = [[seed, 1 + seed % 3] for seed in range(4000)]
    assert publisher.publish(key(1), model) == "granted"
    assert reader.open(key(1), publish=False) == "attached"
    assert reader.digests() == publisher.expected()
    for client in (publisher, reader):
        client.unmap_all()
        client.close()
