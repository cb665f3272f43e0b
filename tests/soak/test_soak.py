"""The short form of `make soak`; and what it counts, it finds."""

from __future__ import annotations

import pytest
from soak import LeftoverError, check, soak
from store_node import StoreNode, key, open_model, publish, wait_for_status

PARTS = [(1, 100_000), (2, 5000)]


def test_clients_that_come_and_die_at_random_leave_nothing():
    """Sixty at a time for twelve seconds; processes of them are killed meanwhile."""
    found = soak(seconds=12, processes=3, clients=25, seed=7, growth=32 << 20)
    counts, counters = found["counts_of_those_not_killed"], found["counters"]
    assert found["clients_at_a_time"] >= 30
    assert min(found["processes_killed"], counts["read"], counts["published"], counts["died"], counts["removed"]) > 0
    assert counters["aborted_publishes"] > 0
    assert counters["attaches"] >= counts["read"]  # those of the killed are counted by the store alone
    assert found["store"]["fds_after"] <= found["store"]["fds_before"]


@pytest.fixture
def node(monkeypatch):
    monkeypatch.delenv("WOOLY_REDIS_URL", raising=False)
    with StoreNode() as started:
        yield started


@pytest.fixture
def session(node):
    with node.session() as connected:
        wait_for_status(connected, lambda status: status.catalog.state == "ok", "the catalog, which has fds too")
        yield connected


def test_the_count_passes_where_nothing_is_left(node, session):
    fds = node.usage().fds
    assert open_model(session, key(1)) is None
    publish(session, key(1), PARTS)
    session.leave(key(1))
    assert check(node, session, fds) == {"models_left": 1, "segments_left": 1, "resident_left": 2 << 20}


@pytest.mark.parametrize("left", ["a connection", "a reader", "a publisher", "an fd"])
def test_the_count_finds_what_is_left(node, session, left):
    fds = node.usage().fds
    other = node.session("left") if left == "a connection" else None
    if left == "an fd":
        fds -= 1
    elif left in {"a reader", "a publisher"}:
        assert open_model(session, key(1)) is None
    if left == "a reader":
        publish(session, key(1), PARTS)
    with pytest.raises(LeftoverError):
        check(node, session, fds, patience_s=0.5)
    if other is not None:
        other.close()
