"""A time limit that passes while an engine goes to sleep: it stays awake, and can sleep later."""

from __future__ import annotations

import pytest
from support.content import key

from shared_store.base.errors import TimedOutError

MIB = 1 << 20
MODEL = [[1, 3 * MIB], [2, 100]]


@pytest.mark.usefixtures("store")
def test_an_engine_whose_sleep_timed_out_sleeps_later(process):
    """Another reader is making the host copies, for longer than the engine waits."""
    engine, other = process("engine"), process("other")
    for one in (engine, other):
        one.publish(key=key(1), model=MODEL)
    assert other.begin_host_copies(key=key(1)) > 0
    engine.limit_sleep(timeout_s=0.2)
    with pytest.raises(TimedOutError):
        engine.sleep()
    assert engine.alive()
    assert engine.digests() == engine.expected()
    other.release_host_copies(key=key(1))
    engine.sleep()
    assert engine.mapped() == 0
    engine.wake()
    assert engine.digests() == engine.expected()
