"""Quarantine of wrong bytes: no new reader gets them, readers keep their mappings, and the model is published anew."""

from __future__ import annotations

import asyncio
import os

import pytest
from support.content import blob, key, manifest_of
from support.served import ServedStore
from support.stores import resident
from support.waiting import wait_until

from shared_store.base.errors import ModelNotFoundError, PermissionDeniedError, ProtocolError
from shared_store.base.manifest import encode
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages
from shared_store.store.assembly import Parts
from shared_store.store.session import Session
from shared_store.store.state.clients import Client as StoreClient

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100]]


@pytest.fixture
def served(directory):
    """A store whose memory stays writable after a commit."""
    with ServedStore(directory, FakeBackend("cpu", seals=False)) as served:
        yield served


def test_a_wrong_blob_is_quarantined(served):
    """From the report to the end of the last reader."""
    reader, client, engine = served.client("reader"), served.client(), served.client()
    reader.publish(key(1), MODEL)
    served.turn_a_bit(reader.blobs[0].digest)
    client.open(key(1))
    assert client.digests() != client.expected()
    client.quarantine(key(1), [0])
    status = client.session.status()
    assert status.models == ()
    (held,) = status.quarantine
    assert (held.device, held.bytes, held.models, held.readers) == ("cpu", 4 * MIB, (key(1),), 2)
    assert [(one.key, one.role) for one in status.clients if one.name == "reader"] == [(key(1), "reader")]
    assert status.counters.quarantines == 1
    assert [kind for kind, _ in served.events][-2:] == ["quarantined", "withdrawn"]

    # The next engine shares none of the old bytes.
    assert engine.open(key(1)) == "granted"
    assert engine.plan(key(1), MODEL) == [True, True]
    engine.fill(key(1))
    engine.unmap()
    engine.commit(key(1))
    assert engine.digests() == engine.expected()
    assert resident(client) == 8 * MIB

    client.leave(key(1))
    assert client.open(key(1)) == "attached"
    assert client.digests() == client.expected()
    assert client.session.status().quarantine[0].readers == 1
    reader.unmap_all()
    reader.close()
    wait_until(
        lambda: served.backend.allocated_bytes == 4 * MIB, "the quarantined segment to be released with its last reader"
    )
    assert client.session.status().quarantine == ()


def test_the_client_that_found_wrong_bytes_may_publish_at_once(served):
    """It need not leave first: the next leave ends its use of the withdrawn model, too."""
    client = served.client()
    client.publish(key(1), MODEL)
    served.turn_a_bit(client.blobs[1].digest)
    client.quarantine(key(1), [0, 1])
    assert client.publish(key(1), MODEL) == "granted"
    assert client.digests() == client.expected()
    assert served.backend.allocated_bytes == 8 * MIB
    client.leave(key(1))
    assert served.backend.allocated_bytes == 4 * MIB
    assert client.session.status().models[0].readers == 0


def test_all_models_with_blobs_in_the_segment_are_withdrawn(served):
    """Models without blobs there are not, and blobs of withdrawn models in other segments remain."""
    client, reader = served.client(), served.client()
    client.publish(key(1), MODEL)
    client.leave(key(1))
    reader.publish(key(2), [[2, 100], [3, MIB]])  # the first in the segment of model 1
    client.publish(key(3), [[3, MIB]])  # in the segment of model 2
    client.publish(key(4), [[4, MIB]])
    served.turn_a_bit(reader.blobs[0].digest)
    reader.quarantine(key(2), [0])
    status = client.session.status()
    assert {one.key for one in status.models} == {key(3), key(4)}
    assert [(one.models, one.readers) for one in status.quarantine] == [((key(2),), 1)]
    client.leave(key(3))
    client.remove(key(3))
    assert reader.digests()[1] == reader.expected()[1]
    assert served.backend.allocated_bytes == 4 * MIB + 2 * MIB + 2 * MIB  # the segment of the reader, and model 4
    reader.leave(key(2))
    assert served.backend.allocated_bytes == 2 * MIB


def test_a_false_report_changes_nothing(served):
    client = served.client()
    client.publish(key(1), MODEL)
    client.quarantine(key(1), [0, 1])
    status = client.session.status()
    assert (status.quarantine, status.counters.quarantines) == ((), 0)
    assert [one.key for one in status.models] == [key(1)]
    client.session.quarantine(key(1), [bytes(32)])  # a digest that it does not have
    assert client.session.status().models
    with pytest.raises(ModelNotFoundError):
        client.session.quarantine(key(2), [])


def test_where_the_host_cannot_read_only_administrators_are_trusted(served):
    client = served.client()
    client.publish(key(1), MODEL)
    served.backend.host_readable = False
    (known,) = served.parts.state.clients.values()
    known.uid += 1
    with pytest.raises(
        PermissionDeniedError, match="may not have memory of cpu quarantined, which the store cannot verify"
    ):
        client.quarantine(key(1), [0])
    with pytest.raises(PermissionDeniedError, match="may not compact memory"):
        client.session.compact("cpu")
    assert client.session.status().models
    known.uid -= 1
    client.quarantine(key(1), [0])
    assert client.session.status().models == ()


def test_a_publisher_that_counts_on_a_wrong_blob_plans_anew(served):
    """Its commit is refused, and its next plan does not count on the blob."""
    reader, publisher = served.client(), served.client()
    reader.publish(key(1), MODEL)
    publisher.open(key(2))
    assert publisher.plan(key(2), [*MODEL, [5, 100]]) == [False, False, True]
    publisher.fill(key(2))
    publisher.unmap()
    served.turn_a_bit(reader.blobs[0].digest)
    reader.quarantine(key(1), [0])
    with pytest.raises(ProtocolError, match="was not planned"):
        publisher.commit(key(2))
    assert publisher.plan(key(2), [*MODEL, [5, 100]]) == [True, True, True]
    publisher.fill(key(2))
    publisher.unmap()
    publisher.commit(key(2))
    assert publisher.digests() == publisher.expected()


def test_a_model_withdrawn_right_after_its_commit_is_published_by_the_waiter():
    """Between the commit and the answer to the waiting `Open`."""

    async def scenario():
        parts = Parts({"cpu": FakeBackend("cpu")}, {})
        state, opening, publishing = parts.state, parts.requests.opening, parts.requests.publishing
        publisher, waiter = (
            Session(StoreClient(number, 1, os.getuid(), ""), asyncio.Event(), lambda *_: None) for number in (1, 2)
        )
        for session in (publisher, waiter):
            parts.sessions.begin(session)
        request = messages.Open(1, key(1), "model", "test", "cpu", publish=True)
        assert isinstance((await opening.open(publisher, request)).reply, messages.Granted)
        waiting = asyncio.create_task(opening.open(waiter, request))
        await asyncio.sleep(0)
        blobs = (blob(b""),)
        (segment,) = (await publishing.plan(publisher, messages.Plan(2, key(1), blobs))).reply.segments
        (await publishing.fill(publisher, messages.Fill(3, key(1), segment.id))).fds.close()
        manifest = encode(manifest_of(key(1), blobs))
        (await publishing.commit(publisher, messages.Commit(4, key(1), manifest))).fds.close()
        assert not waiting.done()
        parts.requests.quarantining.stop_sharing("cpu", {segment.id}, pid=0)
        assert isinstance((await waiting).reply, messages.Granted)
        assert [one.publisher for one in state.models.all()] == [2]
        assert [one.readers for one in state.models.withdrawn().values()] == [{1}]
        parts.devices.close()

    asyncio.run(scenario())
