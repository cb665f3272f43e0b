"""Fixtures for sessions of a real store; a folder's `conftest.py` imports them."""

import pytest
from support.fixtures import directory, start_store

from shared_store.client.session import Session

__all__ = ["directory", "sessions", "start_store", "store"]


@pytest.fixture
def store(start_store, directory):
    """A running store without a catalog, which nothing here needs."""
    return start_store(redis_url=f"unix://{directory}/away")


@pytest.fixture
def sessions(store, directory):
    """Connect to the store as a client of some name; all connections end with the test."""
    opened = []

    def connect(name="test"):
        opened.append(Session.connect(directory, name=name, autostart=False))
        return opened[-1]

    assert store.pid
    yield connect
    for session in opened:
        session.close()
