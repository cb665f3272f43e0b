"""A time limit that passes while an engine goes to sleep: it stays awake, and can sleep later."""

from __future__ import annotations

import pytest
from support.content import key
from support.session_fixtures import directory, start_store, store
from support.waiting import wait_until

from shared_store.base.errors import TimedOutError
from shared_store.base.keys import host_key
from shared_store.sleep.sleeper import Sleeper

__all__ = ["directory", "start_store", "store"]

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100]]


def test_an_engine_whose_sleep_timed_out_sleeps_later(store):
    """Another client is making the host copy, for longer than the engine waits."""
    engine, other = store.client("engine"), store.client("other")
    engine.publish(key(1), MODEL)
    copy = host_key(key(1), [one.digest for one in engine.blobs])
    assert other.open(copy) == "granted"
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
    other.abandon(copy)
    engine.sleep()
    assert engine.mapped() == 0
    engine.wake()
    assert engine.digests() == engine.expected()
    wait_until(lambda: [model.readers for model in engine.session.status().models if model.key == key(1)] == [1], "it")
