"""A publisher dies, or sends wrong bytes or requests: nothing of it is served, and the next client is granted."""

from __future__ import annotations

import pytest
from support.content import blob, content, key, manifest_of
from support.stores import resident, wait_for_status
from support.waiting import open_segments, wait_until

from shared_store.base.errors import (
    DigestMismatchError,
    MemoryBackendError,
    NotPublisherError,
    OutOfMemoryError,
    ProtocolError,
)
from shared_store.base.manifest import Blob, encode
from shared_store.protocol import messages

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100], [3, MIB]]


def wait_in_line(store, process, name):
    """Begin to open a model that is being published; return once the store has queued the request."""
    process.begin("open", key=name)
    client = store.client()
    wait_for_status(client, lambda status: any(one.role == "waiting" for one in status.clients), "the wait")
    return client


@pytest.mark.parametrize("moment", ["opened", "planned", "half written", "written", "unmapped"])
def test_publisher_killed(store, actor, moment):
    """The waiter is granted, the memory of the dead publisher is freed, and the bytes served later are right."""
    victim, heir = actor(), actor()
    victim.open(key=key(1))
    if moment != "opened":
        victim.plan(key=key(1), model=MODEL)
    if moment in {"half written", "written", "unmapped"}:
        victim.fill(key=key(1), half=moment == "half written")
    if moment == "unmapped":
        victim.unmap()
    client = wait_in_line(store, heir, key(1))
    assert resident(client) == (0 if moment in {"opened", "planned"} else 6 * MIB)
    victim.kill()
    assert heir.finish() == "granted"
    assert resident(client) == 0
    wait_until(lambda: open_segments(store.pid) == 0, "the segments to be released")
    assert heir.plan(key=key(1), model=MODEL) == [True] * 3  # nothing written before counts
    heir.fill(key=key(1))
    heir.unmap()
    heir.commit(key=key(1))
    assert heir.digests() == heir.expected()
    assert client.open(key(1)) == "attached"
    assert client.digests() == heir.expected()
    assert client.session.status().counters.aborted_publishes == 1


def test_publisher_killed_while_the_store_checks_its_bytes(store, actor):
    """All bytes were written: the model is served if they are right, or published by the next client; never wrong."""
    victim, heir = actor(), actor()
    victim.open(key=key(1))
    victim.plan(key=key(1), model=[[1, 64 * MIB]])
    victim.fill(key=key(1))
    victim.unmap()
    wait_in_line(store, heir, key(1))
    victim.begin("commit", key=key(1))
    victim.kill()
    if heir.finish() == "granted":
        heir.plan(key=key(1), model=[[1, 64 * MIB]])
        heir.fill(key=key(1))
        heir.unmap()
        heir.commit(key=key(1))
    assert heir.digests() == heir.expected()


def test_publisher_killed_beside_a_model_that_has_its_blobs(store, actor):
    """Blobs that it shares with a committed model stay; its other blobs are freed."""
    reader, victim, client = actor(), actor(), store.client()
    reader.publish(key=key(1), model=[[1, 3 * MIB]])
    before = resident(client)
    victim.open(key=key(2))
    assert victim.plan(key=key(2), model=MODEL) == [False, True, True]
    victim.fill(key=key(2), half=True)
    assert resident(client) > before
    victim.kill()
    wait_until(lambda: resident(client) == before, "the dead publisher's segments to go")
    assert reader.digests() == reader.expected()


def test_publisher_sends_a_wrong_digest(store, actor):
    """One bit in one blob: the commit is refused, the memory is freed, and the publisher may start over."""
    liar, heir = actor(), actor()
    liar.open(key=key(1))
    liar.plan(key=key(1), model=MODEL)
    liar.fill(key=key(1), lie=0)
    liar.unmap()
    client = wait_in_line(store, heir, key(1))
    with pytest.raises(DigestMismatchError, match=f"published as {blob(content(1, 3 * MIB)).digest.hex()[:16]}"):
        liar.commit(key=key(1))
    assert resident(client) == 0
    assert heir.idle()  # nothing was served
    liar.unmap_all()
    assert liar.plan(key=key(1), model=MODEL) == [True] * 3
    liar.fill(key=key(1))
    liar.unmap()
    liar.commit(key=key(1))
    assert heir.finish() == "attached"
    assert heir.digests() == heir.expected()


@pytest.mark.usefixtures("store")
def test_publisher_claims_other_bytes_for_a_resident_blob(actor):
    """It cannot write blobs of other models: the committed bytes do not change."""
    reader, liar = actor(), actor()
    reader.publish(key=key(1), model=[[1, 3 * MIB]])
    liar.open(key=key(2))
    assert liar.plan(key=key(2), model=[[1, 3 * MIB], [2, 100]]) == [False, True]
    liar.write(index=0, text="scribble")  # its own private copy
    liar.fill(key=key(2))
    liar.unmap()
    liar.commit(key=key(2))
    assert liar.digests() == liar.expected()
    assert reader.digests() == reader.expected()


@pytest.mark.usefixtures("store")
def test_publisher_commits_while_it_can_still_write(actor):
    publisher = actor()
    publisher.open(key=key(1))
    publisher.plan(key=key(1), model=MODEL)
    publisher.fill(key=key(1))
    with pytest.raises(MemoryBackendError, match="still mapped for writing; unmap it before commit"):
        publisher.commit(key=key(1))
    publisher.unmap()
    publisher.commit(key=key(1))
    assert publisher.digests() == publisher.expected()


def test_publisher_commits_before_it_has_filled_all(store):
    client = store.client()
    client.open(key(1))
    client.plan(key(1), MODEL)
    with pytest.raises(ProtocolError, match="never filled"):
        client.commit(key(1))
    client.fill(key(1))
    client.unmap()
    client.commit(key(1))


def test_publisher_commits_another_manifest_than_it_planned(store):
    client = store.client()
    client.open(key(1))
    client.plan(key(1), MODEL)
    client.fill(key(1))
    client.unmap()
    blobs = list(client.blobs)
    wrong = {
        "fewer blobs": manifest_of(key(1), blobs[:2]),
        "another order": manifest_of(key(1), blobs[::-1]),
        "another blob": manifest_of(key(1), [*blobs[:2], blob(b"another")]),
        "another key": manifest_of(key(2), blobs),
        "another device": manifest_of(key(1), blobs, device="tpu"),
    }
    for name, manifest in wrong.items():
        with pytest.raises(ProtocolError) as caught:
            client.session._call(messages.Commit(client.session._next(), key(1), encode(manifest)), messages.Attached)
        assert "not that of its plan" in str(caught.value), name
    client.commit(key(1))
    assert client.digests() == client.expected()


def test_a_client_that_was_not_granted_a_model_cannot_publish_it(store, actor):
    publisher, intruder = actor(), store.client()
    publisher.open(key=key(1))
    publisher.plan(key=key(1), model=MODEL)
    intruder.model, intruder.blobs = [], ()
    for call in (
        lambda: intruder.plan(key(1), MODEL),
        lambda: intruder.session.fill(key(1), 1),
        lambda: intruder.commit(key(1)),
        lambda: intruder.session.abandon(key(1), "mine"),
    ):
        with pytest.raises(NotPublisherError):
            call()
    publisher.fill(key=key(1))
    publisher.unmap()
    publisher.commit(key=key(1))


def test_a_publisher_is_given_only_its_own_segments(store, actor):
    """Requests with the number of another publisher's segment, of a committed one, or of none are refused."""
    other, client = actor(), store.client()
    other.open(key=key(2))
    other.plan(key=key(2), model=[[9, MIB]])
    client.open(key(1))
    client.plan(key(1), MODEL)
    mine = {segment for _, segment in client.promised}
    for segment in sorted({1, 2, 3, 99} - mine):
        with pytest.raises(ProtocolError, match=f"segment {segment} is not promised"):
            client.session.fill(key(1), segment)
    client.fill(key(1))
    with pytest.raises(ProtocolError, match="allocated already"):
        client.session.fill(key(1), mine.pop())


def test_a_digest_that_comes_with_two_sizes(store, actor):
    """For a blob that the store has, and within one plan."""
    actor().publish(key=key(1), model=[[1, 1000]])
    client = store.client()
    client.open(key(2))
    known = blob(content(1, 1000)).digest
    for blobs in ([Blob(known, 999)], [Blob(bytes(32), 1), Blob(bytes(32), 2)]):
        with pytest.raises(ProtocolError, match="bytes, not"):
            client.session.plan(key(2), blobs)
    for blobs in ([Blob(bytes(32), -1)], [Blob(bytes(31), 1)], [Blob(b"", 1)]):
        with pytest.raises(ProtocolError, match="malformed"):
            client.session.plan(key(2), blobs)
    client.abandon(key(2))


def test_the_store_is_full_by_its_limit(start_store, actor):
    """The message says how much is needed and free, the store is unchanged, and freed memory is used."""
    store = start_store(max_resident={"cpu": 8 * MIB})
    reader, client = actor(), store.client()
    reader.publish(key=key(1), model=[[1, 3 * MIB]])
    client.open(key(2))
    with pytest.raises(OutOfMemoryError) as caught:
        client.plan(key(2), [[2, 5 * MIB]])
    text = str(caught.value)
    assert f"{6 * MIB} bytes are needed, {4 * MIB} of the limit of {8 * MIB} are free" in text
    assert "in use: model (3145728 bytes); stop a reader" in text
    assert "raise --max-resident" in text
    assert resident(client) == 4 * MIB
    assert reader.digests() == reader.expected()
    reader.leave(key=key(1))
    client.remove(key(1))
    client.plan(key(2), [[2, 5 * MIB]])
    client.fill(key(2))
    client.unmap()
    client.commit(key(2))
    assert client.digests() == client.expected()


def test_two_publishers_cannot_pass_the_limit_together(start_store):
    """Planned segments count towards the limit before they are allocated."""
    store = start_store(max_resident={"cpu": 8 * MIB})
    one, two = store.client(), store.client()
    one.open(key(1))
    one.plan(key(1), [[1, 5 * MIB]])
    two.open(key(2))
    with pytest.raises(OutOfMemoryError):
        two.plan(key(2), [[2, 5 * MIB]])
    one.abandon(key(1))
    two.plan(key(2), [[2, 5 * MIB]])


def test_the_machine_is_full(store):
    """More than the machine has is refused before anything is allocated, with numbers; the publisher may go on."""
    client = store.client()
    client.open(key(1))
    huge = 1 << 50
    planned, _ = client.session.plan(key(1), [Blob(bytes(32), huge)])
    with pytest.raises(
        OutOfMemoryError, match=f"cannot allocate a segment of {huge} bytes on cpu: [0-9]+ bytes are free"
    ):
        client.session.fill(key(1), planned.segments[0].id)
    assert resident(client) == 0
    client.abandon(key(1))
    assert client.publish(key(1), MODEL) == "granted"
