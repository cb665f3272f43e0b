"""A reader or a waiting client misbehaves: no other client is affected."""

from __future__ import annotations

import os
import signal

import pytest
from support.content import key
from support.rawclient import RawClient
from support.stores import wait_for_status
from support.waiting import process_state, wait_until

from shared_store.base.errors import ConnectionLostError, ProtocolError
from shared_store.protocol import messages

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100]]


@pytest.mark.usefixtures("store")
def test_a_reader_writes_into_a_weight(actor):
    """It sees its own write; other readers, later readers and the store do not."""
    writer, other = actor(), actor()
    writer.publish(key=key(1), model=MODEL)
    other.open(key=key(1))
    writer.write(index=0, text="overwritten")
    assert bytes.fromhex(writer.read(index=0, nbytes=11)) == b"overwritten"
    assert writer.digests()[0] != writer.expected()[0]
    assert writer.private_bytes() == os.sysconf("SC_PAGE_SIZE")
    assert other.digests() == other.expected()
    assert other.private_bytes() == 0
    late = actor()
    late.open(key=key(1))
    assert late.digests() == late.expected()


def test_a_reader_is_killed(store, actor):
    victim, other = actor(), actor()
    victim.publish(key=key(1), model=MODEL)
    other.open(key=key(1))
    victim.kill()
    client = store.client()
    wait_for_status(client, lambda status: status.models[0].readers == 1, "the dead reader's lease to end")
    assert other.digests() == other.expected()


def test_a_waiting_client_is_killed(store, actor):
    """It is never granted; the next waiter is."""
    publisher, victim, heir = actor(), actor(), actor()
    publisher.open(key=key(1))
    client = store.client()
    for count, process in ((1, victim), (2, heir)):
        process.begin("open", key=key(1))
        wait_for_status(
            client,
            lambda status, count=count: sum(one.role == "waiting" for one in status.clients) == count,
            "the wait",
        )
    victim.kill()
    wait_for_status(client, lambda status: sum(one.role == "waiting" for one in status.clients) == 1, "its end")
    publisher.kill()
    assert heir.finish() == "granted"


def test_a_client_is_frozen_before_it_greets(store, actor):
    with RawClient(store.paths.socket, greet=False):
        assert actor().publish(key=key(1), model=MODEL) == "granted"


def test_a_client_that_never_greets_is_cut_off(store):
    with RawClient(store.paths.socket, greet=False, timeout_s=20) as silent:
        assert silent.ended()
    assert store.client().session.status().counters.protocol_errors == 0  # idle, which is no error


def test_a_frozen_reader_keeps_its_lease_and_delays_no_other_client(store, actor):
    frozen, others = actor(name="frozen"), [actor() for _ in range(3)]
    frozen.publish(key=key(1), model=MODEL)
    frozen.stop()
    for process in others:
        assert process.open(key=key(1)) == "attached"
        assert process.digests() == process.expected()
    assert others[0].publish(key=key(2), model=[[5, MIB]]) == "granted"
    assert store.client().session.status().models[0].readers == 4
    frozen.resume()
    assert frozen.digests() == frozen.expected()


@pytest.mark.usefixtures("store")
def test_a_frozen_publisher_delays_only_its_waiters(actor):
    publisher, waiter, other = actor(), actor(), actor()
    publisher.open(key=key(1))
    publisher.plan(key=key(1), model=MODEL)
    publisher.stop()
    waiter.begin("open", key=key(1))
    assert other.publish(key=key(2), model=MODEL) == "granted"
    assert waiter.idle()
    publisher.resume()
    publisher.fill(key=key(1))
    publisher.unmap()
    publisher.commit(key=key(1))
    assert waiter.finish() == "attached"
    assert waiter.digests() == waiter.expected()


def test_a_client_does_not_read_its_replies(store, actor):
    """Its replies are buffered up to a limit; past it the store closes the connection. Other clients go on."""
    publisher = actor()
    publisher.publish(key=key(1), model=MODEL)
    with RawClient(store.paths.socket) as deaf:
        for number in range(1, 61):
            deaf.send(messages.GetStatus(number))
        assert actor().open(key=key(1)) == "attached"
        assert {deaf.receive().id for _ in range(60)} == set(range(1, 61))  # nothing is lost


def test_a_client_never_reads_and_keeps_requesting(store, actor):
    """More unread replies than the limit: it is told so, the connection is closed, and the buffers are freed."""
    actor().publish(key=key(1), model=MODEL)
    wide = store.client()
    wide.session.open(key(2), name="n" * (4 * MIB), engine="", device="cpu", publish=True, timeout_s=10)
    with RawClient(store.paths.socket) as deaf:
        with pytest.raises(ConnectionLostError, match=r"Broken pipe|reset by peer"):
            deaf.send_for_ever(messages.GetStatus)
        wide.close()
    assert "client is not reading its socket" in store.log() or "requests wait for an answer" in store.log()
    assert actor().open(key=key(1)) == "attached"


def test_a_client_forks(store, actor):
    """The child gets an error with the next step, and does not extend the parent's lease."""
    parent = actor(name="parent")
    parent.publish(key=key(1), model=MODEL)
    child = parent.fork()
    try:
        assert child["said"].startswith("StoreUnavailableError: ")
        assert "connect again after a fork" in child["said"]
        assert parent.alive()
        assert parent.status()["models"][0]["readers"] == 1
        parent.kill()
        assert process_state(child["pid"]) == "S"
        client = store.client()
        wait_for_status(client, lambda status: status.models[0].readers == 0, "the dead parent's lease to end")
        assert client.remove(key(1)) == key(1)
    finally:
        os.kill(child["pid"], signal.SIGKILL)
        wait_until(lambda: process_state(child["pid"]) in {"", "Z"}, "the child to end")


def test_a_client_asks_twice_for_one_model(store):
    client = store.client()
    client.publish(key(1), MODEL)
    with pytest.raises(ProtocolError, match="has asked for model"):
        client.open(key(1))
    assert client.digests() == client.expected()
    client.leave(key(1))
    assert client.open(key(1)) == "attached"


@pytest.mark.parametrize("bad", ["", "short", "F" * 64, key(1) + "0", key(1)[:-1] + "/"])
def test_a_client_opens_a_malformed_key(store, bad):
    """The form of keys is checked, since they are parts of names elsewhere (of publishers, in the catalog)."""
    with pytest.raises(ProtocolError, match="64 hexadecimal digits"):
        store.client().open(bad)


def test_a_client_sends_malformed_digests(store):
    from shared_store.base.checkpoint import FileId

    client, file = store.client(), FileId(1, 2, 3, 4, 5)
    with pytest.raises(ProtocolError, match="32 bytes"):
        client.session.remember_files([(file, b"short")])
    assert client.session.recall_files([file]) == [None]
    client.session.remember_files([(file, bytes(range(32)))])
    assert client.session.recall_files([file, FileId(1, 2, 3, 4, 6)]) == [bytes(range(32)), None]


def test_a_closed_session_raises(store):
    client = store.client()
    client.close()
    client.close()
    assert not client.alive()
    with pytest.raises(ConnectionLostError):
        client.status()
