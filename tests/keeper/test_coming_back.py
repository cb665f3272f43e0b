"""What a session does while there is no store."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading

from support.client import Client
from support.stores import KeptStore
from support.waiting import open_fds, open_segments, wait_until

ONE = "a" * 64
MODEL = [[1, 300_000]]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "wooly-session"]


def test_closed_while_there_is_no_store(kept):
    """It gives up at once: no thread, no fd and no memory of the model stays behind."""
    fds, segments = open_fds(), open_segments()
    client = Client(kept.directory)
    client.publish(ONE, MODEL)
    kept.kill_both()
    wait_until(lambda: not client.alive(), "the client to notice")
    assert threads()
    client.unmap_all()
    client.close()
    wait_until(lambda: not threads(), "its thread to end")
    assert (open_fds(), open_segments()) == (fds, segments)


def test_tries_are_not_logged(kept, caplog):
    """However long there is no store, the log has nothing of it; that the client is back is one line."""
    client = kept.client()
    client.publish(ONE, MODEL)
    kept.kill_both()
    wait_until(lambda: not client.alive(), "the client to notice")
    with caplog.at_level(logging.INFO):
        again = KeptStore(kept.directory).start()
        try:
            wait_until(client.alive, "the client to be back")
            wait_until(lambda: caplog.messages, "the line that says so")
        finally:
            again.clean_up()
    said = [record.getMessage() for record in caplog.records if record.name == "shared_store.client.connection"]
    assert said == [f"wooly: rejoined the store (pid {client.session.store_pid})"]


def test_session_without_models_comes_back_when_it_asks(kept):
    """It has nothing to come back for by itself; the next question is answered by the next store."""
    client = kept.client()
    pid = kept.kill_store()
    assert client.session.status().store.pid != pid


def test_fork_while_there_is_no_store(kept, actor):
    """A forked child is refused the session and does not come back in the parent's place."""
    parent = actor()
    parent.publish(key=ONE, model=MODEL)
    kept.kill_both()
    wait_until(lambda: not parent.alive(), "the client to notice")
    child = parent.fork()
    assert "connect again after a fork" in child["said"]
    again = KeptStore(kept.directory).start()
    try:
        wait_until(lambda: again.status().models and again.status().models[0].readers == 1, "the parent to be back")
        assert [one.pid for one in again.status().clients if one.role == "reader"] == [parent.pid]
    finally:
        os.kill(child["pid"], signal.SIGKILL)
        again.clean_up()


def test_a_client_without_free_descriptors_rejoins_when_it_has_one(kept, actor):
    """Reconnecting needs a socket. As long as there is none it is tried again, and the model stays mapped."""
    client = actor(name="full")
    client.publish(key=ONE, model=MODEL)
    soft, hard = resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    before = kept.kill_store()
    wait_until(lambda: kept.store_pid != before, "another store")
    assert not client.alive()
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(client.alive, "the client to rejoin")
    (model,) = kept.status().models
    assert model.readers == 1
    assert client.digests() == client.expected()
