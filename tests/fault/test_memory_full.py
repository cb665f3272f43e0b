"""Memory runs out during a publication: an error with numbers, and an unchanged store."""

from __future__ import annotations

import pytest
from support.content import key
from support.groups import MemoryGroup
from support.stores import resident
from support.waiting import open_segments, wait_until

from shared_store.base.errors import OutOfMemoryError

MIB = 1 << 20
HEADROOM = 256 * MIB  # bytes that the store leaves free, on the machine and in its control group


@pytest.fixture
def group():
    made = MemoryGroup()
    yield made
    made.remove()


def test_the_control_group_is_full_in_the_middle_of_publishing(group, start_store, actor):
    """The store refuses before the kernel would kill it: other clients go on, and freed memory is used."""
    store = start_store()
    group.limit(HEADROOM + 96 * MIB)
    group.add(store.pid)
    reader, publisher, client = actor(), actor(), store.client()
    reader.publish(key=key(1), model=[[1, 40 * MIB]])
    publisher.open(key=key(2))
    publisher.plan(key=key(2), model=[[2, 60 * MIB]])
    with pytest.raises(OutOfMemoryError, match=r"cannot allocate a segment of \d+ bytes on cpu: \d+ bytes are free"):
        publisher.fill(key=key(2))
    assert resident(client) == 40 * MIB
    late = actor()
    assert late.open(key=key(1)) == "attached"
    assert reader.digests() == reader.expected()

    reader.leave(key=key(1))
    late.leave(key=key(1))
    client.remove(key(1))
    publisher.fill(key=key(2))
    publisher.unmap()
    publisher.commit(key=key(2))
    assert publisher.digests() == publisher.expected()
    wait_until(lambda: open_segments(store.pid) == 1, "the store to close what it sent to the publisher")
    store.kill()
