"""A short soak leaves nothing, and its count finds what is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.content import content, key

from benchmarks.harness.device import Device
from benchmarks.harness.node import Node
from benchmarks.harness.published import open_model, publish
from benchmarks.harness.store import catalog_ready
from benchmarks.soak.command import soak
from benchmarks.soak.count import LeftoverError, check
from shared_store.client.session import Session

CONTENTS = [content(1, 100_000), content(2, 5000)]


def test_clients_that_die_at_random_leave_nothing() -> None:
    """Up to 75 clients for twelve seconds, while some of their processes are killed."""
    found = soak(seconds=12, processes=3, clients=25, seed=7, growth=32 << 20)
    counts, counters = found["counts_of_those_not_killed"], found["counters"]
    assert found["clients_at_a_time"] >= 30
    assert min(found["processes_killed"], counts["read"], counts["published"], counts["died"], counts["removed"]) > 0
    assert counters["aborted_publishes"] > 0
    assert counters["attaches"] >= counts["read"]  # only the store counts the attaches of killed processes
    assert found["store"]["fds_after"] <= found["store"]["fds_before"]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.delenv("WOOLY_REDIS_URL", raising=False)
    with Node() as started:
        started.start()
        yield started


@pytest.fixture
def session(node: Node) -> Iterator[Session]:
    with node.session() as connected:
        catalog_ready(connected)
        yield connected


def test_count_passes_if_nothing_is_left(node: Node, session: Session) -> None:
    fds = node.usage().fds
    assert open_model(session, key(1)) is None
    publish(session, Device(), key(1), CONTENTS)
    session.leave(key(1))
    assert check(session, fds) == {"models_left": 1, "segments_left": 1, "resident_left": 2 << 20}


@pytest.mark.parametrize("left", ["a connection", "a reader", "a publisher", "an fd"])
def test_count_finds_what_is_left(node: Node, session: Session, left: str) -> None:
    fds = node.usage().fds
    other = node.session("left") if left == "a connection" else None
    if left == "an fd":
        fds -= 1
    elif left in {"a reader", "a publisher"}:
        assert open_model(session, key(1)) is None
    if left == "a reader":
        publish(session, Device(), key(1), CONTENTS)
    with pytest.raises(LeftoverError):
        check(session, fds, patience_s=0.5)
    if other is not None:
        other.close()
