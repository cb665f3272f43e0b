"""Real keepers, stores and clients."""

import pytest
from support.fixtures import actor, directory, start_store, store
from support.stores import KeptStore

__all__ = ["actor", "directory", "start_kept", "start_store", "store"]


@pytest.fixture
def start_kept(directory):
    """Start a keeper and its store with options (`popen`: of the keeper's process). Both end with the test."""
    started = []

    def start(*, popen=None, **options):
        started.append(KeptStore(directory, **options))
        return started[-1].start(**(popen or {}))

    yield start
    for one in started:
        one.clean_up()


@pytest.fixture
def kept(start_kept):
    """A keeper and its store."""
    return start_kept()
