"""Protocol violations end the connection with a reason, and affect no other client."""

from __future__ import annotations

import contextlib
import os
import resource
import struct

import pytest
from support.content import key
from support.rawclient import RawClient
from support.stores import wait_for_status
from support.waiting import wait_until

from shared_store.base.errors import ProtocolVersionError, TooManyClientsError
from shared_store.client.session import Session
from shared_store.protocol import messages, wire
from shared_store.store.connection import MAX_BEFORE_HELLO, MAX_FROM_CLIENT
from shared_store.store.exchange import MAX_REFUSED, MAX_REQUESTS

MODEL = [[1, 3 << 20], [2, 100]]
STATUS = messages.encode(messages.GetStatus(1))


@pytest.fixture
def bystander(store, actor):
    """A reader that must not be affected. The store must count one violation, and leak no fd."""
    reader = actor()
    reader.publish(key=key(1), model=MODEL)
    client = store.client()
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog, which opens fds")
    before = store.open_fds()
    yield reader
    assert reader.alive()
    assert reader.digests() == reader.expected()
    assert reader.status()["counters"]["protocol_errors"] == 1
    wait_until(lambda: store.open_fds() <= before, "the store to close all other fds")


def frame(payload):
    return wire.header(payload, 0) + payload


BEFORE_HELLO = {
    "garbage": (b"GET / HTTP/1.1\r\n\r\n", "message_too_large"),
    "a frame of garbage": (frame(b"\xc1 garbage"), "protocol"),
    "an empty frame": (frame(b""), "protocol"),
    "a request": (frame(STATUS), "protocol"),
    "a store's message": (frame(messages.encode(messages.Granted(1))), "protocol"),
    "an oversized greeting": (
        frame(messages.encode(messages.Hello(messages.VERSION, "n" * MAX_BEFORE_HELLO, "0"))),
        "message_too_large",
    ),
    "an older protocol version": (frame(messages.encode(messages.Hello(0, "old", "0.0.1"))), "protocol_version"),
    "a newer protocol version": (frame(messages.encode(messages.Hello(2**31, "new", "99"))), "protocol_version"),
    "fds that were announced": (struct.pack(">IH", 10, 3), "protocol"),
}


@pytest.mark.parametrize("name", BEFORE_HELLO)
@pytest.mark.usefixtures("bystander")
def test_before_the_greeting(store, name):
    data, code = BEFORE_HELLO[name]
    with RawClient(store.paths.socket, greet=False) as client:
        client.send_bytes(data)
        assert client.refusal() == code


AFTER_HELLO = {
    "garbage": (b"\xff" * 100, "message_too_large"),
    "a frame of garbage": (frame(b"\xc1 garbage"), "protocol"),
    "deep nesting": (frame(b"\x81\xa4type" + b"\x91" * 100_000), "protocol"),
    "an oversized frame": (struct.pack(">IH", MAX_FROM_CLIENT + 1, 0), "message_too_large"),
    "a second greeting": (frame(messages.encode(messages.Hello(messages.VERSION, "again", "0"))), "protocol"),
    "a message without a type": (frame(b"\x81\xa2id\x01"), "protocol"),
    "an id that is no number": (frame(b"\x82\xa4type\xa5dance\xa2id\xa3one"), "protocol"),
    "a message without its fields": (frame(b"\x82\xa4type\xa4open\xa2id\x01"), "protocol"),
    "a field of another type": (frame(b"\x82\xa4type\xaaget_status\xa2id\xa3one"), "protocol"),
    "a store's message": (frame(messages.encode(messages.Push(1, "shutdown"))), "protocol"),
    "an id that is under way": (frame(STATUS) * 2, "protocol"),
    "a flood of requests": (
        b"".join(frame(messages.encode(messages.GetStatus(n))) for n in range(1, 10 + MAX_REQUESTS + MAX_REFUSED)),
        "too_many_requests",
    ),
    "an offer without a rejoin": (
        frame(messages.encode(messages.Offer(1, key(1), b"", (), (), 0, 7))),
        "protocol",
    ),
}


@pytest.mark.parametrize("name", AFTER_HELLO)
@pytest.mark.usefixtures("bystander")
def test_after_the_greeting(store, name):
    data, code = AFTER_HELLO[name]
    with RawClient(store.paths.socket) as client:
        client.send_bytes(data)
        assert client.refusal() == code


@pytest.mark.usefixtures("bystander")
def test_fds_from_a_client(store):
    """Fds with a request are refused and closed."""
    with RawClient(store.paths.socket) as client:
        client.send_fds(frame(STATUS), [0] * 100)
        assert client.refusal() == "protocol"


def test_a_truncated_frame(store, actor):
    """A client that dies while it sends is no violation, and the frame has no effect."""
    publisher = actor()
    publisher.publish(key=key(1), model=MODEL)
    publisher.leave(key=key(1))
    removal = frame(messages.encode(messages.Remove(1, key(1))))
    for cut in (1, wire.HEADER.size, len(removal) - 1):
        with RawClient(store.paths.socket) as client:
            client.send_bytes(removal[:cut])
    client = store.client()
    wait_for_status(client, lambda status: len(status.clients) == 2, "the raw clients to disconnect")
    assert client.open(key(1)) == "attached"


def test_a_frame_byte_by_byte(store):
    with RawClient(store.paths.socket) as client:
        for byte in frame(STATUS):
            client.send_bytes(bytes([byte]))
        assert isinstance(client.receive(), messages.StatusReply)


def test_as_many_requests_as_are_allowed(store):
    """All are answered."""
    with RawClient(store.paths.socket) as client:
        ids = range(1, MAX_REQUESTS + 1)
        client.send_bytes(b"".join(frame(messages.encode(messages.GetStatus(n))) for n in ids))
        assert sorted(client.receive().id for _ in ids) == list(ids)


def test_a_flood_while_one_request_waits(store, actor):
    """A waiter that floods the store loses its connection, and its place in the queue."""
    publisher = actor()
    publisher.open(key=key(1))
    client = store.client()
    with RawClient(store.paths.socket) as flood:
        flood.send(messages.Open(1000, key(1), "", "", "cpu", publish=True))
        wait_for_status(client, lambda status: any(one.role == "waiting" for one in status.clients), "the wait")
        flood.send_bytes(AFTER_HELLO["a flood of requests"][0])
        assert flood.refusal() == "too_many_requests"
        wait_for_status(client, lambda status: all(one.role != "waiting" for one in status.clients), "its end")
    assert client.session.status().counters.protocol_errors == 1


def test_requests_over_the_limit_are_refused_alone(store, actor):
    """Waits count; the refused request has no effect, and the others are answered."""
    publisher = actor()
    for number in range(1, MAX_REQUESTS + 2):
        publisher.open(key=key(number))
    with RawClient(store.paths.socket) as eager:
        for number in range(1, MAX_REQUESTS + 2):
            eager.send(messages.Open(number, key(number), "", "", "cpu", publish=True))
        refused = eager.receive()
        assert (refused.id, refused.code) == (MAX_REQUESTS + 1, "too_many_requests")
        publisher.abandon(key=key(3))
        assert eager.receive() == messages.Granted(3)
        eager.send(messages.GetStatus(200))
        assert eager.receive().id == 200


def test_an_unknown_request_ends_nothing(store):
    with RawClient(store.paths.socket) as client:
        client.send_frame(b"\x82\xa4type\xa5dance\xa2id\x07")
        failed = client.receive()
        assert (failed.id, failed.code) == (7, "unsupported")
        assert "dance" in failed.message
        client.send_frame(b"\x81\xa4type\xa5dance")  # without an id, there is nothing to answer
        client.send(messages.GetStatus(8))
        assert client.receive().id == 8


def test_session_of_another_version(store, monkeypatch):
    """The error names both versions and the solution."""
    monkeypatch.setattr(messages, "VERSION", 9)
    monkeypatch.setattr(messages, "OLDEST", 8)
    with pytest.raises(
        ProtocolVersionError, match=r"speaks protocol 9, this store .* speaks 1 to 2; install one version"
    ):
        store.client()


def test_a_failed_request_does_not_end_the_connection(store):
    with RawClient(store.paths.socket) as client:
        client.send(messages.Remove(7, "ff"))
        failed = client.receive()
        assert (failed.id, failed.code) == (7, "model_not_found")
        client.send(messages.GetStatus(8))
        assert client.receive().id == 8


def test_an_answer_to_an_unknown_push_is_ignored(store):
    with RawClient(store.paths.socket) as client:
        client.send(messages.Unsupported(99))
        client.send(messages.GetStatus(1))
        assert client.receive().id == 1


def test_a_thousand_connections(start_store, actor):
    """Connections up to the limit are served. One more is refused until others disconnect."""
    store = start_store(max_clients=1000)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip("this process may not open a thousand sockets (ulimit -n)")
    with contextlib.ExitStack() as stay:
        with contextlib.ExitStack() as leave:
            clients = [
                (stay if number % 2 else leave).enter_context(RawClient(store.paths.socket, timeout_s=60))
                for number in range(999)
            ]
            reader = store.client()
            assert reader.publish(key(1), MODEL) == "granted"
            with pytest.raises(TooManyClientsError, match="has its 1000 clients; raise --max-clients"):
                actor()
            assert len(reader.session.status().clients) == 1000
        wait_for_status(reader, lambda status: len(status.clients) == 500, "the connections to end")
        assert actor().open(key=key(1)) == "attached"
        for client in clients[1::2]:
            client.send(messages.RecallFiles(1, ()))
            assert client.receive().id == 1


def test_a_store_that_may_open_few_files(start_store, actor):
    """Without free fds, new clients wait, and connected clients are served."""
    store = start_store()
    reader = actor()
    reader.publish(key=key(1), model=MODEL)
    client = store.client()
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    limit = store.open_fds() + 4
    _, hard = resource.prlimit(store.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(store.pid, resource.RLIMIT_NOFILE, (limit, hard))
    with contextlib.ExitStack() as clients:
        for _ in range(30):
            clients.enter_context(RawClient(store.paths.socket, greet=False))
        wait_until(lambda: "cannot accept a client" in store.log(), "the store to be out of fds")
        assert reader.status()["models"][0]["readers"] == 1
    resource.prlimit(store.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert actor().open(key=key(1)) == "attached"


def test_a_reader_that_the_store_has_no_fds_for(start_store):
    """`Open` fails with a typed error that names the solution, and may be repeated."""
    store = start_store()
    client = store.client()
    client.publish(key(1), MODEL)
    reader = store.client()
    wait_for_status(client, lambda status: status.catalog.state == "ok", "the catalog")
    _, hard = resource.prlimit(store.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(store.pid, resource.RLIMIT_NOFILE, (store.lowest_free_fd(), hard))
    with pytest.raises(Exception, match="ulimit -n") as caught:
        reader.open(key(1))
    assert caught.value.code == "memory"
    assert client.session.status().models[0].readers == 1
    resource.prlimit(store.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert reader.open(key(1)) == "attached"
    assert reader.digests() == reader.expected()


def test_a_client_that_may_open_few_files(store):
    """The kernel drops fds over the limit: the client gets an error, not an incomplete model."""
    client = store.client()
    client.publish(key(1), MODEL)
    reader = store.client()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(Exception, match="ulimit -n") as caught:
            reader.session.open(key(1), name="", engine="", device="cpu", publish=True, timeout_s=10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.code == "protocol"
    assert isinstance(reader.session, Session)
    assert not reader.alive()
