"""Keeper and store close all descriptors of disconnected clients and removed models."""

from __future__ import annotations

import pytest
from support.descriptors import no_leak_in
from support.waiting import wait_until

ONE, OTHER = "a" * 64, "b" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]


@pytest.fixture
def kept(start_kept, directory):
    """A keeper and its store, without a catalog server: its connections would change the counts."""
    return start_kept(redis_url=f"unix://{directory}/away")


def test_clients_that_left_and_clients_that_were_killed(kept, actor):
    """The keeper has a descriptor of each segment until its model is removed."""
    with no_leak_in(kept.pid, kept.store_pid):
        publisher, reader, unfinished = (actor() for _ in range(3))
        publisher.publish(key=ONE, model=MODEL)
        reader.open(key=ONE)
        unfinished.open(key=OTHER)
        unfinished.plan(key=OTHER, model=[[3, 1000]])
        unfinished.fill(key=OTHER)
        unfinished.kill()
        reader.kill()
        publisher.leave(key=ONE)
        publisher.remove(key=ONE)
        publisher.close()


def test_restarts_of_the_store(kept, actor):
    """After restarts and the removal of all models, the keeper has as many descriptors as at first."""
    with no_leak_in(kept.pid):
        publisher = actor()
        publisher.publish(key=ONE, model=MODEL)
        for _ in range(3):
            pid = kept.kill_store()
            wait_until(lambda pid=pid: publisher.alive() and publisher.store_pid() != pid, "the client to reconnect")
        publisher.leave(key=ONE)
        publisher.remove(key=ONE)
        publisher.close()
