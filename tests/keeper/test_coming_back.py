"""A session while no store is running."""

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
    """Closing stops the reconnection at once, and frees its thread, its fds and the memory of the model."""
    fds, segments = open_fds(), open_segments()
    client = Client(kept.directory)
    client.publish(ONE, MODEL)
    kept.kill_both()
    wait_until(lambda: not client.alive(), "the client to lose its connection")
    assert threads()
    client.unmap_all()
    client.close()
    wait_until(lambda: not threads(), "its thread to end")
    assert (open_fds(), open_segments()) == (fds, segments)


def test_tries_are_not_logged(kept, caplog):
    """Failed attempts to reconnect are not logged. Success is one line."""
    client = kept.client()
    client.publish(ONE, MODEL)
    kept.kill_both()
    wait_until(lambda: not client.alive(), "the client to lose its connection")
    with caplog.at_level(logging.INFO):
        again = KeptStore(kept.directory).start()
        try:
            wait_until(client.alive, "the client to reconnect")
            wait_until(lambda: caplog.messages, "the log line")
        finally:
            again.clean_up()
    said = [record.getMessage() for record in caplog.records if record.name == "shared_store.client.connection"]
    assert said == [f"wooly: rejoined the store (pid {client.session.store_pid})"]


def test_session_without_models_reconnects_on_its_next_request(kept):
    """It does not reconnect in the background. The next store answers its next request."""
    client = kept.client()
    pid = kept.kill_store()
    assert client.session.status().store.pid != pid


def test_fork_while_there_is_no_store(kept, actor):
    """A forked child cannot use the session, and does not reconnect in place of its parent."""
    parent = actor()
    parent.publish(key=ONE, model=MODEL)
    kept.kill_both()
    wait_until(lambda: not parent.alive(), "the client to lose its connection")
    child = parent.fork()
    assert "connect again after a fork" in child["said"]
    again = KeptStore(kept.directory).start()
    try:
        wait_until(lambda: again.status().models and again.status().models[0].readers == 1, "the parent to rejoin")
        assert [one.pid for one in again.status().clients if one.role == "reader"] == [parent.pid]
    finally:
        os.kill(child["pid"], signal.SIGKILL)
        again.clean_up()


def test_a_client_without_free_descriptors_rejoins_when_it_has_one(kept, actor):
    """Reconnecting needs a socket. As long as there is none it is tried again, and the model stays mapped."""
    client = actor(name="full")
    client.publish(key=ONE, model=MODEL)
    limits = resource.prlimit(client.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
    before = kept.kill_store()
    wait_until(lambda: kept.store_pid != before, "another store")
    assert not client.alive()
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, limits)
    wait_until(client.alive, "the client to rejoin")
    (model,) = kept.status().models
    assert model.readers == 1
    assert client.digests() == client.expected()
