"""A request that is not answered in time: it is cancelled, a late grant is returned, and the session goes on."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from support.content import key
from support.scripted import ScriptedStore
from support.waiting import open_fds, process_state, readable, wait_until

from shared_store.base.errors import ConnectionLostError, TimedOutError
from shared_store.client import channel
from shared_store.client.session import Session
from shared_store.protocol import messages
from shared_store.protocol.messages.capabilities import ABANDON_COMPACTION

SEGMENT = messages.SegmentInfo(1, 1 << 21)
BIG = tuple((number, 0, 0, 0, 0) for number in range(200_000))
"""Identities of files: as a message, more than a socket's buffer."""


@pytest.fixture
def scripted(directory):
    store = ScriptedStore(directory)
    yield store
    store.close()


def connect(directory):
    return lambda: Session.connect(directory, name="test", autostart=False)


def test_a_session_goes_on_after_a_request_timed_out(sessions):
    """Its models and turns remain, and what timed out may be asked for again."""
    publisher, session = sessions("publisher"), sessions("hasty")
    open_model(publisher, 1)
    open_model(session, 2)
    with session.turn("mine", 10.0):
        with pytest.raises(TimedOutError, match="did not answer `open`"):
            open_model(session, 1, timeout_s=0.1)
        assert session.alive
        with pytest.raises(TimedOutError), sessions().turn("mine", 0.1):
            pass
    status = session.status()
    assert {(model.key, model.state) for model in status.models} == {(key(1), "publishing"), (key(2), "publishing")}
    assert [one.role for one in status.clients if one.name == "hasty"] == ["publisher"]
    publisher.abandon(key(1), "test")
    assert open_model(session, 1) is None
    assert session.store_pid == publisher.store_pid


def test_a_turn_that_came_too_late_goes_to_the_next(sessions):
    first, hasty, heir = sessions(), sessions(), sessions()
    with first.turn("one", 10.0), pytest.raises(TimedOutError), hasty.turn("one", 0.1):
        pass
    with heir.turn("one", 10.0), pytest.raises(TimedOutError), hasty.turn("one", 0.1):
        pass
    with hasty.turn("one", 10.0):
        pass


def open_model(session, number, *, timeout_s=10.0):
    return session.open(key(number), name="", engine="", device="cpu", publish=True, timeout_s=timeout_s)


def ask_for_a_turn(session):
    with session.turn("one", 0.1):
        pass


def compact(session):
    session._connection.call(
        messages.Compact(session._next(), "cpu"),
        messages.Compacting,
        0.1,
        repeat=False,
    )


def ask_in_vain(ask, session):
    with pytest.raises(TimedOutError):
        ask(session)


LATE = {
    "a turn": (ask_for_a_turn, messages.Granted, messages.Yield(0, "one"), 0),
    "a publication": (
        lambda session: open_model(session, 1, timeout_s=0.1),
        messages.Granted,
        messages.Abandon(0, key(1), "the client stopped waiting before the grant"),
        0,
    ),
    "a model": (
        lambda session: open_model(session, 1, timeout_s=0.1),
        lambda n: messages.Attached(n, b"", (), (SEGMENT,)),
        messages.Leave(0, key(1)),
        1,
    ),
    "a compaction": (
        compact,
        lambda n: messages.Compacting(n, SEGMENT, (SEGMENT,), ()),
        messages.AbandonCompaction(0, 1),
        2,
    ),
}


@pytest.mark.parametrize("kind", LATE)
def test_a_grant_that_crosses_the_cancel_is_returned(scripted, directory, kind):
    """And its fds are closed. Requests about the same thing wait until then; others do not."""
    ask, late, returned, fds = LATE[kind]
    peer, session = scripted.welcome(connect(directory), capabilities=(ABANDON_COMPACTION,))
    with session:
        before = open_fds()
        with pytest.raises(TimedOutError):
            ask(session)
        request = peer.receive()
        assert peer.receive() == messages.Cancel(request.id)
        with pytest.raises(TimedOutError):  # nothing about it is sent before the answer
            ask(session)
        assert peer.silent(0.05)
        with pytest.raises(TimedOutError):
            session._connection.call(messages.RecallFiles(1000, ()), messages.FileDigests, 0.05, repeat=False)
        assert peer.receive() == messages.RecallFiles(1000, ())
        peer.send(late(request.id), [0] * fds)
        assert peer.receive() == messages.Cancel(1000)
        back = peer.receive()
        assert type(back)(0, *[getattr(back, name) for name in back.__struct_fields__[1:]]) == returned
        peer.send(messages.Done(back.id))
        again = threading.Thread(target=ask_in_vain, args=(ask, session))
        again.start()
        assert type(peer.receive()) is type(request)
        again.join()
        wait_until(lambda: open_fds() == before, "the fds of the late answer to be closed")


def test_an_answer_that_arrives_with_the_time_out_is_used(scripted, directory):
    """Also the error of a cancelled request ends its wait, once."""
    peer, session = scripted.welcome(connect(directory))
    with session:
        with pytest.raises(TimedOutError):
            ask_for_a_turn(session)
        request = peer.receive()
        assert peer.receive() == messages.Cancel(request.id)
        peer.send(messages.Failed(request.id, "cancelled", ""))
        peer.send(messages.Failed(request.id, "cancelled", ""))  # a second answer is ignored
        done = threading.Thread(target=session.report_fallback, args=("a", "b"))
        done.start()
        report = peer.receive()
        peer.send(messages.Done(report.id))
        done.join(10)
        assert session.alive


@pytest.fixture
def stopped(store):
    """A store that was stopped (SIGSTOP), for the test."""

    def stop():
        os.kill(store.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(store.pid) == "T", "the store to stop")

    yield stop
    os.kill(store.pid, signal.SIGCONT)


def recall(session, files, timeout_s):
    """Ask for digests of files, with a time limit that the public method does not have."""
    request = messages.RecallFiles(session._next(), files)
    return session._connection.call(request, messages.FileDigests, timeout_s, repeat=False)


def test_a_stopped_store_delays_each_call_by_its_own_time_limit_only(store, sessions, stopped):
    """A message that its socket does not take blocks no thread; all are answered once the store goes on."""
    session = sessions()
    stopped()
    began = time.monotonic()
    with pytest.raises(TimedOutError):
        recall(session, BIG, 0.2)
    with pytest.raises(TimedOutError):
        recall(session, (), 0.2)
    assert time.monotonic() - began < 10  # a blocking send lasts 60 s
    os.kill(store.pid, signal.SIGCONT)
    assert recall(session, BIG, 30.0)[0].digests == (b"",) * len(BIG)
    assert session.alive
    assert session.status().counters.protocol_errors == 0


def test_a_link_that_the_store_does_not_read_is_closed_before_it_is_replaced(store, sessions, stopped, monkeypatch):
    """The store sees the client once, and no descriptor is left."""
    monkeypatch.setattr(channel, "STALLED_S", 0.3)
    session = sessions("stalled")
    before = open_fds()
    lost = session._connection.link
    stopped()
    with pytest.raises(TimedOutError):
        recall(session, BIG, 0.1)
    wait_until(lambda: not lost.alive, "the link to end")
    wait_until(lambda: open_fds() < before, "its descriptors to be closed")
    os.kill(store.pid, signal.SIGCONT)
    assert [one.name for one in session.status().clients].count("stalled") == 1
    assert session._connection.link is not lost
    assert open_fds() == before


def test_a_session_with_a_store_of_protocol_1_comes_back_after_a_time_out(scripted, directory):
    """That store cannot cancel, so that only the end of the connection revokes a grant."""
    made = []
    client = threading.Thread(target=lambda: made.append(connect(directory)()))
    client.start()
    for protocol in (messages.VERSION, 1):
        peer, hello = scripted.accept()
        assert hello.protocol == protocol
        if protocol != 1:
            peer.send(messages.Failed(0, "protocol_version", "this store speaks 1"))
    assert hello.capabilities == ()
    peer.send(messages.Welcome(1, "0", os.getpid(), 1))
    client.join(10)
    (session,) = made
    with session:
        assert not session.supports(ABANDON_COMPACTION)
        with pytest.raises(TimedOutError):
            ask_for_a_turn(session)
        assert isinstance(peer.receive(), messages.Acquire)
        again = threading.Thread(target=session.report_fallback, args=("a", "b"))
        again.start()
        scripted.accept()[0].send(messages.Failed(0, "protocol_version", "this store speaks 1"))
        peer, _ = scripted.accept()
        peer.send(messages.Welcome(1, "0", os.getpid(), 2))
        report = peer.receive()
        peer.send(messages.Done(report.id))
        again.join(10)
        assert session.alive


def test_a_store_that_closes_the_connection_at_each_request_is_not_flooded(scripted, directory):
    """The delay between attempts doubles: in two seconds there are no more than eight of them."""
    peer, session = scripted.welcome(connect(directory))
    with session:
        failures = []

        def ask():
            with pytest.raises((TimedOutError, ConnectionLostError)) as failed:
                session._connection.call(messages.RecallFiles(1000, ()), messages.FileDigests, 2.0, repeat=True)
            failures.append(failed.value)

        asking = threading.Thread(target=ask)
        asking.start()
        attempts = 0
        while asking.is_alive():
            assert peer.receive() == messages.RecallFiles(1000, ())
            attempts += 1
            peer.close()
            while asking.is_alive() and not readable(scripted.listener, 0.1):
                pass
            if asking.is_alive():
                peer, _ = scripted.accept()
                peer.send(messages.Welcome(messages.VERSION, "0", os.getpid(), 1))
                wait_until(lambda at=peer: readable(at.channel.sock, 0.1) or not asking.is_alive(), "an attempt")
        assert failures
        assert 3 <= attempts <= 9
