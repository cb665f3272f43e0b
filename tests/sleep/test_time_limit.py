"""A time limit that passes while an engine goes to sleep: it stays awake, and can sleep later."""

from __future__ import annotations

import pytest
from support.client import Client
from support.content import key
from support.devices import DEVICE

from shared_store.base.errors import TimedOutError
from shared_store.sleep.sleeper import Sleeper

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100]]


@pytest.fixture
def client(store, directory):
    """Return a function that connects a client of the running store in this process. They end with the test."""
    assert store.pid
    made = []

    def connect(name):
        made.append(Client(directory, name, device=DEVICE))
        return made[-1]

    yield connect
    for one in made:
        one.unmap_all()
        one.close()


def test_an_engine_whose_sleep_timed_out_sleeps_later(store, client):
    """Another client is making the host copies, for longer than the engine waits."""
    engine, other = client("engine"), client("other")
    engine.publish(key(1), MODEL)
    assert other.open(key(1), publish=False) == "attached"
    copies, fds = other.session.sleeping.copy_to_host(key(1), 10.0)
    assert [segment.promised for segment in copies.segments] == [True]
    fds.close()
    engine.sleeper = Sleeper(
        engine.session,
        engine.manifest,
        engine.places,
        engine.segments,
        list(enumerate(engine.mappings)),
        engine.backend,
        timeout_s=0.2,
    )
    with pytest.raises(TimedOutError):
        engine.sleep()
    assert engine.digests() == engine.expected()
    other.session.sleeping.release_host_copies(key(1))
    engine.sleep()
    assert engine.mapped() == 0
    assert [(model.readers, model.away) for model in store.status().models] == [(1, 1)]
    engine.wake()
    assert engine.digests() == engine.expected()
    assert [(model.readers, model.away) for model in store.status().models] == [(2, 0)]
