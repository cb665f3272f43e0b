"""Requests of the store to a client, over real sockets: answers, refusals, cancels, and the ends of connections."""

from __future__ import annotations

import asyncio
import threading

import pytest
from support.content import key
from support.rawclient import RawClient
from support.scripted import ScriptedStore
from support.served import ServedStore
from support.waiting import wait_until

from shared_store.base.errors import (
    ConnectionLostError,
    DeclinedError,
    TimedOutError,
    TooManyRequestsError,
    UnsupportedError,
    WoolyError,
)
from shared_store.client.session import Session
from shared_store.memory.fake import FakeBackend
from shared_store.protocol import messages
from shared_store.store.asking import MAX_ASKED

SWAP_OUT = messages.SwapOut(0, "a test")


@pytest.fixture
def served(directory):
    with ServedStore(directory, FakeBackend("cpu")) as served:
        yield served


@pytest.fixture
def session(served):
    with Session.connect(served.paths.directory, name="workload", autostart=False) as session:
        yield session


def ask(served, session, request=SWAP_OUT, within_s=10.0, heard=lambda _: None):
    """Have the store ask a client; returns the answer."""
    peer = served.call(lambda: served.parts.sessions.of(session.client))
    return served.run(peer.ask(request, within_s=within_s, heard=heard))


def test_a_request_is_answered_while_an_open_waits(served, session):
    """The answer comes before the end of the wait, which the test ends after it."""
    publisher = served.client()
    publisher.open(key(1))
    session.serve(messages.SwapOut, lambda request, _: f"left because of {request.reason}")
    granted = threading.Event()

    def wait():
        assert session.open(key(1), name="", engine="", device="cpu", publish=True, timeout_s=30) is None
        granted.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: served.call(served.parts.waiters.all), "the wait")
    assert ask(served, session).detail == "left because of a test"
    assert not granted.is_set()
    publisher.abandon(key(1))
    waiter.join(10)
    assert granted.is_set()


def test_a_handler_may_use_its_session(served, session):
    """It does not run in the thread that reads."""
    session.serve(messages.SwapOut, lambda *_: str(session.status().store.pid))
    assert ask(served, session).detail == str(session.store_pid)


def test_a_slow_handler_delays_no_other_request(served, session):
    go = threading.Event()

    def serve(request, _):
        if request.reason == "slow":
            assert go.wait(10)
        return request.reason

    session.serve(messages.SwapOut, serve)

    async def both():
        peer = served.parts.sessions.of(session.client)
        slow = asyncio.ensure_future(peer.ask(messages.SwapOut(0, "slow"), within_s=10))
        quick = await peer.ask(messages.SwapOut(0, "quick"), within_s=10)
        pending = not slow.done()
        go.set()
        return quick.detail, pending, (await slow).detail

    assert served.run(both()) == ("quick", True, "slow")


def test_a_client_says_that_it_accepts_and_how_far_it_is(served, session):
    def serve(_, call):
        call.accept()
        call.progress(1, 2, "half")

    session.serve(messages.SwapOut, serve)
    heard = []
    done = ask(served, session, heard=heard.append)
    assert heard == [messages.Accepted(done.id), messages.Progress(done.id, 1, 2, "half")]


def decline(*_):
    raise DeclinedError("a request is running")


def break_down(*_):
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("handler", "error", "text"),
    [
        (decline, DeclinedError, "a request is running"),
        (break_down, WoolyError, "ZeroDivisionError: a bug"),
        (None, UnsupportedError, "does not serve SwapOut"),
    ],
)
def test_a_client_does_not_do_it(served, session, handler, error, text):
    """The reason reaches the store, and the session goes on."""
    if handler is not None:
        session.serve(messages.SwapOut, handler)
    with pytest.raises(error, match=text) as caught:
        ask(served, session)
    assert type(caught.value) is error
    assert session.status().clients[0].name == "workload"


def test_a_request_that_is_not_answered_in_time_is_cancelled(served, session):
    """Its handler is told, and its late answer is ignored."""
    told, end = threading.Event(), threading.Event()

    def serve(_, call):
        assert call.cancelled.wait(10)
        told.set()
        end.wait(10)

    session.serve(messages.SwapOut, serve)
    with pytest.raises(TimedOutError):
        ask(served, session, within_s=0.05)
    assert told.wait(10)
    end.set()
    session.serve(messages.SwapOut, lambda *_: "again")
    assert ask(served, session).detail == "again"


def test_a_client_that_disconnects_answers_nothing_more(served, session):
    begun, cancelled = threading.Event(), threading.Event()

    def serve(_, call):
        begun.set()
        if call.cancelled.wait(10):
            cancelled.set()

    session.serve(messages.SwapOut, serve)
    closing = threading.Thread(target=lambda: (begun.wait(10), session.close()))
    closing.start()
    with pytest.raises(ConnectionLostError):
        ask(served, session)
    closing.join()
    assert cancelled.wait(10)
    assert served.call(lambda: served.parts.sessions.of(1)) is None


def test_a_client_of_protocol_1_cannot_be_asked(served):
    with RawClient(served.paths.socket, protocol=1):
        peer = wait_until(lambda: served.call(lambda: served.parts.sessions.of(1)), "the session")
        with pytest.raises(UnsupportedError, match="protocol 1"):
            served.run(peer.ask(SWAP_OUT, within_s=10))


def test_a_client_that_does_not_answer_is_not_asked_without_end(served):
    with RawClient(served.paths.socket) as silent:

        async def many():
            peer = served.parts.sessions.of(1)
            asked = [asyncio.ensure_future(peer.ask(SWAP_OUT, within_s=10)) for _ in range(MAX_ASKED)]
            await asyncio.sleep(0)
            with pytest.raises(TooManyRequestsError):
                await peer.ask(SWAP_OUT, within_s=10)
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            return len(asked)

        wait_until(lambda: served.call(lambda: served.parts.sessions.of(1)), "the session")
        assert served.run(many()) == MAX_ASKED
        ids = [silent.receive().id for _ in range(2 * MAX_ASKED)]
        assert ids == 2 * list(range(1, MAX_ASKED + 1))  # the requests, then the cancels
        silent.send(messages.Done(1))  # late: ignored
        silent.send(messages.Done(77))
        silent.send(messages.GetStatus(1))
        assert isinstance(silent.receive(), messages.StatusReply)


def test_a_client_answers_an_unknown_request(directory):
    """As unsupported; without an id there is nothing to answer. Nothing ends."""
    store = ScriptedStore(directory)
    peer, session = store.welcome(lambda: Session.connect(directory, name="test", autostart=False))
    with session:
        peer.send_payload(b"\x81\xa4type\xa5dance")
        peer.send_payload(b"\x82\xa4type\xa5dance\xa2id\x07")
        answer = peer.receive()
        assert (answer.id, answer.code) == (7, "unsupported")
        assert session.alive
    store.close()
