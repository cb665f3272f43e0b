"""A full device under a keeper: evicted memory is free when the keeper has closed its descriptor, not before."""

from __future__ import annotations

import os
import signal

import pytest
from support.content import key
from support.devices import DEVICE, limited
from support.waiting import process_state, wait_until

MIB = 1 << 20


def model(seed):
    """Blobs that need a segment of 4 MiB."""
    return [[seed, 3 * MIB]]


class Node:
    """A keeper, its store, and clients that share a device of three segments."""

    def __init__(self, start_kept, actor, *, free="known", capacity=13 * MIB, **options):
        self._actor = actor
        self.environment = limited(capacity, free=free)
        self.kept = start_kept(popen={"env": {**os.environ, **self.environment}}, **options)

    def client(self):
        client = self._actor(connect=False, env=self.environment)
        client.connect(directory=str(self.kept.directory), device=DEVICE)
        return client

    def cache(self, client, *numbers):
        """Publish models, and leave them without readers."""
        for number in numbers:
            client.publish(key=key(number), model=model(number))
            client.leave(key=key(number))

    def plan(self, client, number):
        client.open(key=key(number))
        client.plan(key=key(number), model=model(number))

    def keys(self):
        return {one.key for one in self.kept.status().models if one.state == "committed"}

    def evictions(self):
        return self.kept.status().counters.evictions

    def stop_keeper(self):
        os.kill(self.kept.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(self.kept.pid) == "T", "the keeper to be stopped")

    def resume_keeper(self):
        os.kill(self.kept.pid, signal.SIGCONT)


@pytest.fixture
def node(start_kept, actor):
    """Return a function that starts a node."""
    return lambda **options: Node(start_kept, actor, **options)


@pytest.mark.parametrize("free", ["known", "unknown"])
def test_a_full_device_evicts_one_model_and_waits_for_its_memory(node, free):
    """The keeper reads `Release` late. The allocation goes on once it has, and no second model is evicted."""
    it = node(free=free)
    client = it.client()
    it.cache(client, 1, 2, 3)
    it.plan(client, 4)
    it.stop_keeper()
    client.begin("fill", key=key(4))
    wait_until(lambda: it.evictions() == 1, "the eviction")
    assert client.idle()
    it.resume_keeper()
    client.finish()
    assert it.keys() == {key(2), key(3)}
    client.unmap()
    client.commit(key=key(4))
    assert client.digests() == client.expected()
    assert it.evictions() == 1
