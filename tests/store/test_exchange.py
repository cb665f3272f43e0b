"""Requests over one connection: at once, in order where they are about one thing, cancelled, and limited."""

from __future__ import annotations

import threading

import pytest
from support.content import blob, content, key
from support.rawclient import RawClient
from support.served import ServedStore
from support.stores import wait_for_status
from support.waiting import wait_until

from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages
from shared_store.protocol.wire import header

MIB = 1 << 20
GRANTED, CANCELLED = "granted", "cancelled"


class SlowBackend(FakeBackend):
    """Allocates when it is told to."""

    def __init__(self):
        super().__init__("cpu")
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def create(self, nbytes):
        self.begun.release()
        assert self.go.acquire(timeout=10)
        return super().create(nbytes)


@pytest.fixture
def slow(directory):
    """A store whose allocations last as long as a test likes."""
    backend = SlowBackend()
    with ServedStore(directory, backend) as served:
        yield served
        for _ in range(10):
            backend.go.release()


@pytest.fixture
def raw(store):
    with RawClient(store.paths.socket) as client:
        yield client


def open_request(number, model, *, publish=True):
    return messages.Open(number, key(model), "", "", "cpu", publish)


def waiting(client):
    """Return how many clients wait."""
    return sum(one.role == "waiting" for one in client.session.status().clients)


def wait_for_waiters(client, count):
    wait_until(lambda: waiting(client) == count, f"{count} waiting clients")


def failed(message):
    """Return the id and the code of an error."""
    assert isinstance(message, messages.Failed), message
    return message.id, message.code


# At once, and in order.


def test_requests_are_answered_while_one_waits(store, raw):
    """Also a turn, and the publication of another model."""
    publisher = store.client()
    publisher.open(key(1))
    raw.send(open_request(1, 1))
    for number, request in enumerate(
        (messages.GetStatus, lambda n: messages.Acquire(n, "turn"), lambda n: open_request(n, 2)), 2
    ):
        raw.send(request(number))
        assert raw.receive().id == number
    publisher.abandon(key(1))
    assert raw.receive() == messages.Granted(1)


def test_requests_about_one_model_run_in_the_order_of_their_arrival(slow):
    """`Abandon` behind a `Fill` that lasts waits for it; a request about another model does not."""
    with RawClient(slow.paths.socket) as raw:
        raw.send(open_request(1, 1))
        raw.send(messages.Plan(2, key(1), (blob(content(1, MIB)),)))
        assert raw.receive() == messages.Granted(1)
        segment = raw.receive().segments[0].id
        raw.send(messages.Fill(3, key(1), segment))
        assert slow.backend.begun.acquire(timeout=10)
        raw.send(messages.Abandon(4, key(1), "enough"))
        raw.send(open_request(5, 1))
        raw.send(open_request(6, 2))
        assert raw.receive() == messages.Granted(6)
        slow.backend.go.release()
        assert isinstance(filled := raw.receive(), messages.Filled)
        assert (filled.id, raw.receive(), raw.receive()) == (3, messages.Done(4), messages.Granted(5))


def test_a_request_that_waits_lets_the_next_one_about_its_model_begin(store, raw):
    """A second `Open` of the model is refused at once, not queued behind the first."""
    store.client().open(key(1))
    raw.send(open_request(1, 1))
    raw.send(open_request(2, 1))
    assert failed(raw.receive()) == (2, "protocol")


# Cancels.


def test_a_cancelled_wait_for_a_model_frees_its_place(store, raw):
    """It is answered at once, and the model goes to the next waiter."""
    publisher, heir, watcher = store.client(), RawClient(store.paths.socket), store.client()
    with heir:
        publisher.open(key(1))
        raw.send(open_request(1, 1))
        wait_for_waiters(watcher, 1)
        heir.send(open_request(1, 1))
        wait_for_waiters(watcher, 2)
        raw.send(messages.Cancel(1))
        assert failed(raw.receive()) == (1, CANCELLED)
        assert waiting(watcher) == 1
        publisher.abandon(key(1))
        assert heir.receive() == messages.Granted(1)
        raw.send(messages.GetStatus(2))
        assert raw.receive().id == 2  # and nothing came before


def test_a_cancelled_wait_for_a_turn_frees_its_place(store, raw):
    first, heir = RawClient(store.paths.socket), RawClient(store.paths.socket)
    with first, heir:
        first.send(messages.Acquire(1, "turn"))
        assert first.receive() == messages.Granted(1)
        raw.send(messages.Acquire(1, "turn"))
        raw.send(messages.GetStatus(2))
        assert raw.receive().id == 2  # it has joined the queue
        heir.send(messages.Acquire(1, "turn"))
        heir.send(messages.GetStatus(2))
        assert heir.receive().id == 2
        raw.send(messages.Cancel(1))
        assert failed(raw.receive()) == (1, CANCELLED)
        first.send(messages.Yield(3, "turn"))
        assert heir.receive() == messages.Granted(1)
        raw.send(messages.Acquire(3, "turn"))  # it may ask again
        heir.send(messages.Yield(3, "turn"))
        assert raw.receive() == messages.Granted(3)


def test_a_queued_request_is_cancelled_before_it_begins(slow):
    with RawClient(slow.paths.socket) as raw:
        raw.send(open_request(1, 1))
        raw.send(messages.Plan(2, key(1), (blob(content(1, MIB)),)))
        raw.receive()
        segment = raw.receive().segments[0].id
        raw.send(messages.Fill(3, key(1), segment))
        assert slow.backend.begun.acquire(timeout=10)
        raw.send(messages.Abandon(4, key(1), "never"))
        raw.send(messages.Report(5, key(1), 1))
        raw.send(messages.Cancel(4))
        assert failed(raw.receive()) == (4, CANCELLED)
        slow.backend.go.release()
        assert isinstance(raw.receive(), messages.Filled)
        assert raw.receive().id == 5
        assert slow.call(lambda: slow.parts.state.models.get(key(1)).publisher) == 1


def test_a_cancel_that_crosses_the_grant_changes_nothing(store, raw):
    """The grant stands; the client returns it."""
    raw.send(open_request(1, 1))
    raw.send(messages.Cancel(1))
    raw.send(messages.Cancel(99))  # of no request
    answer = raw.receive()
    if answer == messages.Granted(1):
        raw.send(messages.Abandon(2, key(1), "late"))
        assert raw.receive() == messages.Done(2)
    else:
        assert failed(answer) == (1, CANCELLED)
    assert store.client().session.status().models == ()


@pytest.mark.parametrize("kind", ["model", "turn"])
def test_leaving_a_queue_ends_the_wait(store, raw, kind):
    """`Leave` and `Yield` of a client that waits: the wait is answered as cancelled."""
    holder = store.client()
    if kind == "model":
        holder.open(key(1))
        raw.send(open_request(1, 1))
        wait_for_waiters(store.client(), 1)
        raw.send(messages.Leave(2, key(1)))
    else:
        holder.acquire_for_good("turn")
        raw.send(messages.Acquire(1, "turn"))
        raw.send(messages.Yield(2, "turn"))
    answers = sorted((raw.receive() for _ in range(2)), key=lambda one: one.id)
    assert failed(answers[0]) == (1, CANCELLED)
    assert answers[1] == messages.Done(2)


def test_a_cancelled_compaction_leaves_nothing(slow):
    """`Cancel` while its memory is allocated, and `AbandonCompaction` after the answer."""
    for _ in range(10):
        slow.backend.go.release()
    publisher = slow.client()
    for number, model in ((1, [[1, MIB], [2, MIB]]), (2, [[2, MIB], [3, MIB]])):
        publisher.publish(key(number), model)
        publisher.leave(key(number))
    publisher.remove(key(1))  # the second model keeps one blob of the first one's segment
    allocated = slow.backend.allocated_bytes
    while slow.backend.go.acquire(blocking=False):
        pass
    while slow.backend.begun.acquire(blocking=False):
        pass
    with RawClient(slow.paths.socket) as raw:
        raw.send(messages.Compact(1, "cpu"))
        assert slow.backend.begun.acquire(timeout=10)
        raw.send(messages.Cancel(1))
        raw.send(messages.GetStatus(2))
        assert raw.receive().id == 2
        slow.backend.go.release()
        assert failed(raw.receive()) == (1, CANCELLED)
        assert slow.backend.allocated_bytes == allocated
        slow.backend.go.release()
        raw.send(messages.Compact(3, "cpu"))
        task = raw.receive()
        assert isinstance(task, messages.Compacting)
        raw.send(messages.AbandonCompaction(4, task.target.id))
        assert raw.receive() == messages.Done(4)
        assert slow.backend.allocated_bytes == allocated
        raw.send(messages.AbandonCompaction(5, task.target.id))
        assert failed(raw.receive()) == (5, "protocol")


# Clients of protocol 1.


@pytest.fixture
def old(store):
    with RawClient(store.paths.socket, protocol=1) as client:
        yield client


def test_the_greeting_of_protocol_1_is_as_it_was(store):
    """The reply has exactly the keys of that version."""
    import msgspec

    with RawClient(store.paths.socket, greet=False) as client:
        client.send(messages.Hello(1, "old", "0"))
        welcome = msgspec.msgpack.decode(client.channel.receive().payload)
    assert set(welcome) == {"type", "protocol", "version", "pid", "client"}
    assert welcome["protocol"] == 1


def test_requests_of_protocol_1_run_one_at_a_time(store, old):
    publisher = store.client()
    publisher.open(key(1))
    old.send(open_request(1, 1))
    for number in (2, 3, 2):  # ids need not differ
        old.send(messages.GetStatus(number))
    wait_for_waiters(store.client(), 1)
    publisher.abandon(key(1))
    assert [old.receive().id for _ in range(4)] == [1, 2, 3, 2]


@pytest.mark.parametrize(
    "message",
    [messages.Cancel(1), messages.Accepted(1), messages.Done(1), messages.Progress(1, 1)],
    ids=lambda one: type(one).__name__,
)
def test_messages_of_protocol_2_end_a_connection_of_protocol_1(old, message):
    old.send(message)
    assert old.refusal() == "protocol"


def test_an_unknown_request_ends_a_connection_of_protocol_1(old):
    payload = b"\x82\xa4type\xa5dance\xa2id\x01"
    old.send_bytes(header(payload, 0) + payload)
    assert old.refusal() == "protocol"


def test_a_refused_rejoin_of_protocol_1_has_no_ticket(old):
    old.send(messages.Rejoin(1, key(1), (5,)))
    assert failed(old.receive()) == (1, "model_not_found")


# Tickets.


def rejoin(client, number, model, segments):
    client.send(messages.Rejoin(number, key(model), segments))
    return client.receive().ticket


def offer(client, number, model, ticket, fds):
    client.send(messages.Offer(number, key(model), b"", (), (), 0, ticket), fds)


def test_fds_come_with_the_ticket_of_their_model(raw):
    """Requests in between do not matter, and neither does the order of tickets."""
    first, second = rejoin(raw, 1, 1, (5, 6)), rejoin(raw, 2, 2, (7,))
    raw.send(messages.GetStatus(3))
    assert raw.receive().id == 3
    offer(raw, 4, 2, second, [0])
    assert failed(raw.receive()) == (4, "offer_refused")  # its content is empty
    offer(raw, 5, 1, first, [0, 0])
    assert failed(raw.receive()) == (5, "offer_refused")


@pytest.mark.parametrize("wrong", ["another model", "another number", "used", "replaced", "more fds"])
def test_fds_without_their_ticket_end_the_connection(raw, wrong):
    ticket = rejoin(raw, 1, 1, (5,))
    model, fds = 1, [0]
    if wrong == "another model":
        model = 2
    elif wrong == "another number":
        ticket += 1
    elif wrong == "used":
        offer(raw, 2, 1, ticket, [0])
        raw.receive()
    elif wrong == "replaced":
        rejoin(raw, 2, 1, (5,))
    else:
        fds = [0, 0]
    offer(raw, 3, model, ticket, fds)
    assert raw.refusal() == "protocol"


# A peer that does not read.


def test_a_client_that_does_not_read_is_told_so(store):
    """The message comes after what its socket had taken, and other clients are served."""
    wide = store.client()
    for number in range(1, 9):
        wide.session.open(key(number), name="n" * 500, engine="e" * 500, device="cpu", publish=True, timeout_s=10)
    with RawClient(store.paths.socket) as deaf:
        number = 0
        status = messages.encode(messages.GetStatus(0))
        assert len(status) < 100
        while "client is not reading its socket" not in store.log():
            number += 1
            try:
                deaf.send(messages.GetStatus(number))
            except Exception:  # noqa: BLE001 - the store has closed the connection
                break
            if number % 50 == 0:
                wide.session.status()
        assert deaf.refusal() == "not_reading"
    wait_for_status(wide, lambda status: all(one.name != "raw" for one in status.clients), "the connection to end")
