"""Compaction of segments with dead bytes, by a client and by an idle store."""

from __future__ import annotations

import pytest
from support.content import key
from support.devices import Unmeasured
from support.served import ServedStore
from support.stores import resident, wait_for_status
from support.waiting import open_segments, wait_until

from shared_store.base.errors import DigestMismatchError, MemoryBackendError, ProtocolError
from shared_store.memory.fake import FakeBackend

MIB = 1 << 20


@pytest.fixture
def store(start_store):
    """A store that compacts only on request."""
    return start_store(compact_share=1.0)


def leave_dead_bytes(client):
    """Leave model 2 with blobs in two segments, of 8 and 2 MiB, whose bytes are mostly unused."""
    client.publish(key=key(1), model=[[1, 5 * MIB], [2, MIB], [3, MIB]])
    client.leave(key=key(1))
    client.publish(key=key(2), model=[[2, MIB], [4, 100]])
    client.leave(key=key(2))
    client.remove(key=key(1))


def test_dead_bytes_and_padding_are_counted(store):
    client = store.client()
    leave_dead_bytes(client)
    (device,) = client.session.status().devices
    assert (device.resident_bytes, device.segments) == (10 * MIB, 2)
    assert (device.dead_bytes, device.padding_bytes) == (6 * MIB, MIB + 2 * MIB - 100)


def test_a_client_compacts_segments_without_readers(store, actor):
    client, process = store.client(), actor()
    leave_dead_bytes(process)
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
    wait_until(lambda: open_segments(store.pid) == 1, "the store to close what it sent to the reader")


def test_small_models_are_compacted_into_one_segment(store, actor):
    """Each had a segment of 2 MiB. They can still be removed one by one."""
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


def test_segments_with_readers_are_not_compacted(store, actor):
    client, process, reader = store.client(), actor(), actor()
    leave_dead_bytes(process)
    reader.open(key=key(2))
    assert process.compact()["segments"] == 0
    assert resident(client) == 10 * MIB
    assert reader.digests() == reader.expected()


def test_a_reader_that_attaches_during_a_compaction_keeps_its_segments(store, actor):
    """The copies are discarded, and later readers map the same memory."""
    client, process, reader, later = store.client(), actor(), actor(), actor()
    leave_dead_bytes(process)
    moves, segment = process.begin_to_compact(copy=True)
    assert moves == 2
    reader.open(key=key(2))
    assert process.compacted(segment=segment) == [0, 0]
    assert resident(client) == 10 * MIB
    later.open(key=key(2))
    assert resident(client) == 10 * MIB
    assert later.digests() == reader.digests() == reader.expected()


def test_a_model_that_is_removed_during_a_compaction_does_not_move(store, actor):
    """Its copies are dead bytes of the new segment; the other models move."""
    client, process = store.client(), actor()
    for number in (1, 2, 3):
        process.publish(key=key(number), model=[[number, 1000 * number]])
        process.leave(key=key(number))
    moves, segment = process.begin_to_compact(copy=True)
    assert moves == 3
    client.remove(key(2))
    assert resident(client) == 8 * MIB  # the old segments exist until the compaction ends
    assert process.compacted(segment=segment) == [4000, 2 * MIB]
    assert resident(client) == 2 * MIB
    assert process.open(key=key(3)) == "attached"
    assert process.digests() == process.expected()


def test_compacting_client_killed(store, actor):
    """The state is as before, and another client can compact."""
    client, process, victim = store.client(), actor(), actor()
    leave_dead_bytes(process)
    before = open_segments(store.pid)
    victim.begin_to_compact()
    assert resident(client) == 12 * MIB
    assert process.compact()["segments"] == 0  # another client is copying
    victim.kill()
    wait_until(lambda: open_segments(store.pid) == before, "the new segment to go")
    assert resident(client) == 10 * MIB
    assert process.compact()["freed_bytes"] == 8 * MIB


def test_compacting_client_lies(store, actor):
    """Wrong copies are refused, the state is as before, and the client can try again."""
    client, process = store.client(), actor()
    leave_dead_bytes(process)
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


def test_an_idle_store_compacts_its_host_memory(start_store):
    client = start_store().client()
    leave_dead_bytes(client)
    wait_for_status(client, lambda status: status.totals.resident_bytes == 2 * MIB, "the idle store to compact")
    assert client.open(key(2)) == "attached"
    assert client.digests() == client.expected()


def test_compaction_comes_before_eviction(start_store, actor):
    """A publisher gets memory without an eviction."""
    store = start_store(compact_share=1.0, max_resident={"cpu": 12 * MIB})
    client, process = store.client(), actor()
    leave_dead_bytes(process)
    process.publish(key=key(5), model=[[5, 7 * MIB]])
    status = client.session.status()
    assert (status.counters.evictions, status.counters.compactions) == (0, 1)
    assert {one.key for one in status.models} == {key(2), key(5)}
    assert process.digests() == process.expected()
    assert client.open(key(2)) == "attached"
    assert client.digests() == client.expected()


def test_where_the_host_cannot_read_the_client_is_trusted(directory):
    """As on a GPU: the store neither compacts by itself nor verifies; the client digests its copies."""
    backend = FakeBackend("cpu", seals=False)
    with ServedStore(directory, backend) as served:
        client = served.client()
        leave_dead_bytes(client)
        backend.host_readable = False
        assert client.compact()["freed_bytes"] == 8 * MIB
        assert client.open(key(2)) == "attached"
        assert client.digests() == client.expected()
        assert backend.allocated_bytes == 2 * MIB


def test_where_free_memory_is_unknown_compaction_is_off_and_says_why(directory, caplog):
    """Also in the store's log, once."""
    with ServedStore(directory, Unmeasured("cpu")) as served:
        client = served.client()
        leave_dead_bytes(client)
        for _ in range(2):
            with pytest.raises(MemoryBackendError, match=r"free memory is unknown \(NVML is not installed\)"):
                client.compact()
        assert caplog.text.count("free memory of cpu is unknown") == 1


def test_where_free_memory_is_unknown_a_limit_bounds_compaction(directory):
    with ServedStore(directory, Unmeasured("cpu"), limit=14 * MIB) as served:
        client = served.client()
        leave_dead_bytes(client)
        assert client.compact()["freed_bytes"] == 8 * MIB


def test_a_blob_with_wrong_bytes_does_not_move(directory):
    """The client finds it in its copy, and its error names the next step; the state is as before."""
    backend = FakeBackend("cpu", seals=False)
    with ServedStore(directory, backend) as served:
        client = served.client()
        leave_dead_bytes(client)
        served.turn_a_bit(client.blobs[0].digest)
        with pytest.raises(DigestMismatchError, match=r"nothing was changed\. `wooly verify --all`"):
            client.compact()
        client.close()
        other = served.client()
        wait_until(lambda: backend.allocated_bytes == 10 * MIB, "the compaction to end with its client")
        assert other.session.status().counters.compactions == 0


def test_the_store_compacts_segments_above_the_unused_fraction(directory):
    """Those of model 2 are unused by 87 and 99 percent."""
    with ServedStore(directory, FakeBackend("cpu")) as served:
        leave_dead_bytes(served.client())
        assert served.run(served.parts.host_compaction.run("cpu", share=1.0)) == 0
        assert served.backend.allocated_bytes == 10 * MIB
        assert served.run(served.parts.host_compaction.run("cpu", share=0.87)) == 8 * MIB
