"""One store and several client processes: a model is published once, and all readers map one copy."""

from __future__ import annotations

import pytest
from support.content import blob, content, key
from support.stores import resident, wait_for_status
from support.waiting import open_segments, wait_until

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, TimedOutError, UnknownDeviceError
from shared_store.base.layout import GRANULARITY, round_up

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100], [3, 0], [4, MIB + 1], [1, 3 * MIB]]


def segment_bytes(model):
    """Size of one segment with a model's distinct blobs."""
    return round_up(sum(round_up(nbytes, 512) for _, nbytes in {tuple(entry) for entry in model}), GRANULARITY)


def test_many_processes_open_one_key_and_one_publishes(store, actor):
    processes = [actor() for _ in range(6)]
    for process in processes:
        process.begin("publish", key=key(1), model=MODEL)
    outcomes = [process.finish() for process in processes]
    assert sorted(outcomes) == ["attached"] * 5 + ["granted"]
    expected = [blob(content(seed, nbytes)).digest.hex() for seed, nbytes in MODEL]
    assert all(process.digests() == expected for process in processes)
    status = store.client().session.status()
    assert status.counters.publishes == 1
    assert [(model.key, model.state, model.readers) for model in status.models] == [(key(1), "committed", 6)]
    assert status.totals.resident_bytes == segment_bytes(MODEL)
    total = sum(nbytes for _, nbytes in MODEL)
    assert status.totals.mapped_bytes == 6 * total
    assert status.totals.saved_bytes == 6 * total - sum(nbytes for _, nbytes in {tuple(entry) for entry in MODEL})


def test_two_models_share_their_common_blobs(store, actor):
    one, two = actor(), actor()
    one.publish(key=key(1), model=[[1, 3 * MIB], [2, 2 * MIB]])
    assert two.open(key=key(2)) == "granted"
    assert two.plan(key=key(2), model=[[2, 2 * MIB], [3, MIB]]) == [False, True]
    two.fill(key=key(2))
    two.unmap()
    two.commit(key=key(2))
    assert two.digests() == two.expected()
    client = store.client()
    status = client.session.status()
    assert status.totals.resident_bytes == 6 * MIB + 2 * MIB  # one segment of 5 MiB in whole 2 MiB, one of 1
    assert {model.key: model.unique_bytes for model in status.models} == {key(1): 3 * MIB, key(2): MIB}

    one.leave(key=key(1))
    client.remove(key(1))
    assert two.digests() == two.expected()  # its blob is still in the other model's segment
    assert resident(client) == 8 * MIB
    two.leave(key=key(2))
    client.remove(key(2))
    assert resident(client) == 0


def test_another_key_with_the_same_blobs_allocates_nothing(store, actor):
    one, two = actor(), actor()
    one.publish(key=key(1), model=MODEL)
    before = resident(store.client())
    assert two.open(key=key(2)) == "granted"
    assert two.plan(key=key(2), model=MODEL) == [False] * len(MODEL)
    two.commit(key=key(2))
    assert two.digests() == one.digests() == one.expected()
    assert resident(store.client()) == before


def test_two_publishers_of_one_new_blob_end_up_with_one_copy(store, actor):
    """Both write it, because uncommitted blobs are not shared; the copy of the first commit is used by both."""
    one, two = actor(), actor()
    for number, process in ((1, one), (2, two)):
        process.open(key=key(number))
        assert process.plan(key=key(number), model=[[7, 2 * MIB]]) == [True]
        process.fill(key=key(number))
        process.unmap()
    assert resident(store.client()) == 4 * MIB
    one.commit(key=key(1))
    two.commit(key=key(2))
    assert resident(store.client()) == 2 * MIB
    assert two.digests() == two.expected() == one.digests()
    one.leave(key=key(1))
    store.client().remove(key(1))
    assert two.digests() == two.expected()
    assert resident(store.client()) == 2 * MIB


@pytest.mark.usefixtures("store")
def test_a_model_without_bytes_is_a_model(actor):
    one, two = actor(), actor()
    assert one.publish(key=key(1), model=[[3, 0]]) == "granted"
    assert two.open(key=key(1)) == "attached"
    assert two.digests() == two.expected()
    assert one.publish(key=key(2), model=[]) == "granted"
    assert two.open(key=key(2)) == "attached"


def test_remove_is_refused_while_a_model_is_in_use(store, actor):
    reader, admin = actor(), store.client()
    reader.publish(key=key(1), model=MODEL)
    with pytest.raises(ModelInUseError, match="1 readers and is committed; stop them first"):
        admin.remove(key(1))
    assert reader.digests() == reader.expected()
    publisher = actor()
    publisher.open(key=key(2))
    with pytest.raises(ModelInUseError, match="is publishing"):
        admin.remove(key(2))
    reader.leave(key=key(1))
    assert admin.remove(key(1)) == key(1)
    assert resident(admin) == 0


def test_remove_accepts_an_unambiguous_prefix(store):
    client = store.client()
    for number in (0xA1 << 240, 0xA2 << 240):
        client.publish(key(number), [[1, 10]])
        client.leave(key(number))
    with pytest.raises(ModelNotFoundError, match="2 models have keys that begin with 00a"):
        client.remove("00a")
    with pytest.raises(ModelNotFoundError, match="no model with key ff"):
        client.remove("ff")
    assert client.remove("00a1") == key(0xA1 << 240)


def test_a_reader_that_does_not_publish_is_refused_or_waits(store, actor):
    publisher, reader = actor(), actor()
    with pytest.raises(ModelNotFoundError, match="this client only attaches"):
        reader.open(key=key(1), publish=False)
    publisher.open(key=key(1))
    reader.begin("open", key=key(1), publish=False)
    wait_for_status(store.client(), lambda status: any(one.role == "waiting" for one in status.clients), "the wait")
    publisher.abandon(key=key(1))
    with pytest.raises(ModelNotFoundError, match="its publisher aborted, and no other client publishes it"):
        reader.finish()


def test_a_wait_that_times_out_leaves_no_trace(store, actor):
    """Its session goes on, with everything that it has."""
    publisher, hasty = actor(), actor()
    hasty.publish(key=key(2), model=MODEL)
    publisher.open(key=key(1))
    with pytest.raises(TimedOutError, match="did not answer `open`"):
        hasty.open(key=key(1), timeout_s=0.2)
    assert hasty.alive()
    client = store.client()
    wait_for_status(client, lambda status: all(one.role != "waiting" for one in status.clients), "the wait to end")
    publisher.abandon(key=key(1))
    assert [(model.key, model.readers) for model in client.session.status().models] == [(key(2), 1)]
    assert hasty.digests() == hasty.expected()


def test_the_lease_ends_with_the_connection(store, actor):
    reader, client = actor(name="reader"), store.client()
    reader.publish(key=key(1), model=MODEL)
    assert [one.name for one in client.session.status().clients if one.role == "reader"] == ["reader"]
    reader.kill()
    wait_for_status(client, lambda status: status.models[0].readers == 0, "the lease to end")
    assert client.remove(key(1)) == key(1)


def test_turns_pass_on_in_order_and_end_with_the_connection(store, actor):
    first, second, third = actor(), actor(), actor()
    first.acquire_for_good(lease="one")
    second.begin("acquire_for_good", lease="one")
    client = store.client()
    client.status()  # the second client has joined the queue by now, or soon will
    first.acquire_for_good(lease="another")  # turns are independent
    assert second.idle()
    first.kill()
    second.finish()
    third.begin("acquire_for_good", lease="one")
    second.kill()
    third.finish()


def test_an_unknown_device_is_refused_by_name(store):
    with pytest.raises(UnknownDeviceError, match="device 'tpu'"):
        store.client().open(key(1), device="tpu")


def test_many_rounds_leak_nothing(store, actor):
    """After publish, attach, leave and remove, the store has as many descriptors and segments as before."""
    publisher, reader, client = actor(), actor(), store.client()

    def one_round(number):
        publisher.publish(key=key(number), model=[[number, MIB]])
        reader.open(key=key(number))
        publisher.leave(key=key(number))
        reader.leave(key=key(number))
        client.remove(key(number))

    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog, which has fds too")
    one_round(1)
    before = store.open_fds()
    for number in range(2, 40):
        one_round(number)
    assert resident(client) == 0
    wait_until(lambda: store.open_fds() <= before, "the store to have as many descriptors as before")
    wait_until(lambda: open_segments(store.pid) == 0, "the store to close all segments")
