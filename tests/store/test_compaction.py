"""Segments of which little is used are packed, by a client and by an idle store; nobody notices but by the memory."""

from __future__ import annotations

import pytest
from support.content import key
from support.served import ServedStore
from support.stores import resident, wait_for_status
from support.waiting import open_segments, wait_until

from shared_store.base.errors import DigestMismatchError, ProtocolError
from shared_store.memory.fake import FakeBackend

MIB = 1 << 20


@pytest.fixture
def store(start_store):
    """A store that compacts only when it is asked to."""
    return start_store(compact_share=1.0)


def leave_loose(client):
    """Model 2 has blobs in two segments, of 8 and 2 MiB, of which most is dead."""
    client.publish(key=key(1), model=[[1, 5 * MIB], [2, MIB], [3, MIB]])
    client.leave(key=key(1))
    client.publish(key=key(2), model=[[2, MIB], [4, 100]])
    client.leave(key=key(2))
    client.remove(key=key(1))


def test_dead_bytes_and_padding_are_counted(store):
    client = store.client()
    leave_loose(client)
    (device,) = client.session.status().devices
    assert (device.resident_bytes, device.segments) == (10 * MIB, 2)
    assert (device.dead_bytes, device.padding_bytes) == (6 * MIB, MIB + 2 * MIB - 100)


def test_a_client_packs_what_nobody_reads(store, actor):
    client, process = store.client(), actor()
    leave_loose(process)
    assert process.compact() == {"device": "cpu", "segments": 1, "moved_bytes": MIB + 100, "freed_bytes": 8 * MIB}
    status = client.session.status()
    assert (status.devices[0].resident_bytes, status.devices[0].dead_bytes, status.counters.compactions) == (
        2 * MIB,
        0,
        1,
    )
    assert process.compact()["segments"] == 0
    assert process.open(key=key(2)) == "attached"
    assert process.digests() == process.expected()
    assert open_segments(store.pid) == 1


def test_small_models_are_packed_together(store, actor):
    """Each took 2 MiB; and they can still be removed one by one."""
    client, process = store.client(), actor()
    for number in range(1, 11):
        process.publish(key=key(number), model=[[number, 1000]])
        process.leave(key=key(number))
    assert resident(client) == 20 * MIB
    assert process.compact()["freed_bytes"] == 18 * MIB
    client.remove(key(1))
    assert process.open(key=key(2)) == "attached"
    assert process.digests() == process.expected()
    assert client.session.status().devices[0].dead_bytes == 1000


def test_segments_that_somebody_maps_stay(store, actor):
    client, process, reader = store.client(), actor(), actor()
    leave_loose(process)
    reader.open(key=key(2))
    assert process.compact()["segments"] == 0
    assert resident(client) == 10 * MIB
    assert reader.digests() == reader.expected()


def test_a_reader_that_comes_in_the_middle_keeps_its_segments(store, actor):
    """The copies, right as they are, are in vain then and go; whoever comes later maps the same memory."""
    client, process, reader, later = store.client(), actor(), actor(), actor()
    leave_loose(process)
    moves, segment = process.begin_to_compact(copy=True)
    assert moves == 2
    reader.open(key=key(2))
    assert process.compacted(segment=segment) == [0, 0]
    assert resident(client) == 10 * MIB
    later.open(key=key(2))
    assert resident(client) == 10 * MIB
    assert later.digests() == reader.digests() == reader.expected()


def test_a_model_that_goes_in_the_middle_is_not_carried_on(store, actor):
    """Its copies are dead bytes of the new segment; those of the others count."""
    client, process = store.client(), actor()
    for number in (1, 2, 3):
        process.publish(key=key(number), model=[[number, 1000 * number]])
        process.leave(key=key(number))
    moves, segment = process.begin_to_compact(copy=True)
    assert moves == 3
    client.remove(key(2))
    assert resident(client) == 8 * MIB  # what is copied from is kept until the end
    assert process.compacted(segment=segment) == [4000, 2 * MIB]
    assert resident(client) == 2 * MIB
    assert process.open(key=key(3)) == "attached"
    assert process.digests() == process.expected()


def test_compacting_client_killed_in_the_middle(store, actor):
    """Everything is as before, and another client may do it."""
    client, process, victim = store.client(), actor(), actor()
    leave_loose(process)
    before = open_segments(store.pid)
    victim.begin_to_compact()
    assert resident(client) == 12 * MIB
    assert process.compact()["segments"] == 0  # what another one copies is left to it
    victim.kill()
    wait_until(lambda: open_segments(store.pid) == before, "the new segment to go")
    assert resident(client) == 10 * MIB
    assert process.compact()["freed_bytes"] == 8 * MIB


def test_compacting_client_lies(store, actor):
    """Bytes that are not the blobs' are refused, and everything is as before; the liar may try again."""
    client, process = store.client(), actor()
    leave_loose(process)
    _, segment = process.begin_to_compact()
    with pytest.raises(ProtocolError, match="has not ended"):
        process.begin_to_compact()
    with pytest.raises(ProtocolError, match=f"compacts nothing into segment {segment}"):
        client.compacted(segment)
    with pytest.raises(DigestMismatchError, match="the copy of blob"):
        process.compacted(segment=segment)
    with pytest.raises(ProtocolError, match="compacts nothing"):
        process.compacted(segment=segment)
    assert resident(client) == 10 * MIB
    assert process.compact()["freed_bytes"] == 8 * MIB
    assert client.open(key(2)) == "attached"
    assert client.digests() == client.expected()


def test_an_idle_store_packs_its_host_memory(start_store):
    client = start_store().client()
    leave_loose(client)
    wait_for_status(client, lambda status: status.totals.resident_bytes == 2 * MIB, "the store to be idle, and tidy")
    assert client.open(key(2)) == "attached"
    assert client.digests() == client.expected()


def test_packing_comes_before_dropping_models(start_store, actor):
    """A publisher finds room without that anybody leaves."""
    store = start_store(compact_share=1.0, max_resident={"cpu": 12 * MIB})
    client, process = store.client(), actor()
    leave_loose(process)
    process.publish(key=key(5), model=[[5, 7 * MIB]])
    status = client.session.status()
    assert (status.counters.evictions, status.counters.compactions) == (0, 1)
    assert {one.key for one in status.models} == {key(2), key(5)}
    assert process.digests() == process.expected()
    assert client.open(key(2)) == "attached"
    assert client.digests() == client.expected()


def test_where_the_host_cannot_read_the_client_is_believed(directory):
    """As on a GPU: the store neither compacts by itself nor checks; the client's digests are what holds."""
    backend = FakeBackend("cpu", seals=False)
    with ServedStore(directory, backend) as served:
        client = served.client()
        leave_loose(client)
        backend.host_readable = False
        assert client.compact()["freed_bytes"] == 8 * MIB
        assert client.open(key(2)) == "attached"
        assert client.digests() == client.expected()
        assert backend.allocated_bytes == 2 * MIB


def test_a_wrong_blob_is_not_carried_on(directory):
    """The client finds it in its copy, and says what to do; everything is as before."""
    backend = FakeBackend("cpu", seals=False)
    with ServedStore(directory, backend) as served:
        client = served.client()
        leave_loose(client)
        served.turn_a_bit(client.blobs[0].digest)
        with pytest.raises(DigestMismatchError, match=r"nothing was changed\. `wooly verify --all`"):
            client.compact()
        client.close()
        other = served.client()
        wait_until(lambda: backend.allocated_bytes == 10 * MIB, "the compaction to end with its client")
        assert other.session.status().counters.compactions == 0


def test_only_segments_with_enough_that_is_unused_are_packed_by_the_store(directory):
    """Model 2's are unused by 87 and 99 percent."""
    with ServedStore(directory, FakeBackend("cpu")) as served:
        leave_loose(served.client())
        assert served.run(served.parts.host_compaction.run("cpu", share=1.0)) == 0
        assert served.backend.allocated_bytes == 10 * MIB
        assert served.run(served.parts.host_compaction.run("cpu", share=0.87)) == 8 * MIB
