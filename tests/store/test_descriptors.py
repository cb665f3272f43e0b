"""A store closes every descriptor that it had for clients that are gone."""

from __future__ import annotations

import pytest
from support import descriptors
from support.client import Client
from support.content import key
from support.descriptors import no_leak_in

MODEL = [[1, 3 << 20], [2, 100]]


@pytest.fixture
def store(start_store, directory):
    """A store whose catalog is away: its connections come and go by themselves."""
    return start_store(redis_url=f"unix://{directory}/away")


def test_clients_that_left_and_clients_that_were_killed(store, actor):
    """Killed as a reader, as a waiter, and in the middle of a publication."""
    with no_leak_in(store.pid):
        publisher, reader, waiter, unfinished = (actor() for _ in range(4))
        publisher.publish(key=key(1), model=MODEL)
        reader.open(key=key(1))
        unfinished.open(key=key(2))
        unfinished.plan(key=key(2), model=[*MODEL, [3, 5 << 20]])
        unfinished.fill(key=key(2), half=True)
        waiter.begin("open", key=key(2))
        for one in (reader, waiter, unfinished):
            one.kill()
        publisher.leave(key=key(1))
        publisher.remove(key=key(1))
        publisher.close()


def test_the_check_finds_a_client_that_is_still_there(store, directory, monkeypatch):
    """Its socket; and a model that it left behind, which is memory."""
    monkeypatch.setattr(descriptors, "PATIENCE_S", 0.5)
    client = Client(directory)
    try:
        block = no_leak_in(store.pid)
        with pytest.raises(AssertionError, match=r"memfd:wooly.*: 1"), block:
            client.publish(key(1), [[1, 1000]])
        client.unmap_all()
        block = no_leak_in(store.pid)
        with pytest.raises(AssertionError, match=r"socket:\[N\]': -1"), block:
            client.close()
    finally:
        client.unmap_all()
        client.close()
