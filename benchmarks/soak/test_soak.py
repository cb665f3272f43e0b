"""A short soak leaves nothing, and its count finds what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.content import content, key

from benchmarks.harness.device import Device
from benchmarks.harness.node import Node
from benchmarks.harness.published import open_model, publish
from benchmarks.harness.store import catalog_ready
from benchmarks.soak.command import Settings, soak
from benchmarks.soak.count import LeftoverError, check
from benchmarks.soak.trend import Sample, Trend
from shared_store.client.session import Session
from shared_store.protocol import messages

CONTENTS = [content(1, 100_000), content(2, 5000)]


def test_clients_that_die_at_random_leave_nothing() -> None:
    """Up to 75 clients for twelve seconds, while some of their processes are killed."""
    found = soak(Settings(seconds=12, processes=3, clients=25, seed=7, growth=32 << 20))
    counts, counters = found["counts_of_those_not_killed"], found["counters"]
    assert found["clients_at_a_time"] >= 30
    assert found["disruptions"] == {}
    assert min(found["processes_killed"], counts["read"], counts["published"], counts["died"], counts["removed"]) > 0
    assert counters["aborted_publishes"] > 0
    assert counters["attaches"] >= counts["read"]  # only the store counts the attaches of killed processes
    assert found["store"]["fds_after"] <= found["store"]["fds_before"]


def test_two_minutes_of_everything(tmp_path: Path) -> None:
    """Clients of both protocols die at random, and store, keeper and catalog are killed, paused and upgraded.

    The counts at the end are exact, and the descriptors of the last store are as many as those of the first.
    """
    settings = Settings(seconds=120, processes=4, old=1, clients=12, seed=11, growth=32 << 20, disrupt=5, every=1.5)
    found = soak(settings)
    (tmp_path / "soak.json").write_text(json.dumps(found))
    counts, disruptions = found["counts_of_those_not_killed"], found["disruptions"]
    assert set(disruptions) == {"store_killed", "keeper_killed", "catalog_killed", "catalog_paused", "upgraded"}
    assert min(found["processes_killed"], counts["read"], counts["published"], counts["died"], counts["removed"]) > 0
    assert found["store"]["fds_after"] <= found["store"]["fds_before"]
    assert found["keeper"]["fds_after"] <= found["keeper"]["fds_before"]
    assert found["asked"].get("unanswered", 0) == 0
    if hasattr(messages, "Cancel"):
        assert min(counts[name] for name in ("together", "cancelled", "swapped_out", "declined")) > 0
        assert min(found["asked"][name] for name in ("done", "declined", "unsupported")) > 0


def test_slope_of_processes_with_levels_of_their_own() -> None:
    """Two processes that grow by 2 bytes a second each, the second from a lower level."""
    trend = Trend(10.0)
    for pid, start, level in ((1, 0.0, 1000), (2, 100.0, 10)):
        for second in range(60):
            trend.add(Sample(start + second, pid, level + 2 * second + second % 2, 7))
    figures = trend.figures()
    assert figures["processes"] == 2
    assert figures["observed_s"] == 2 * 49
    assert abs(figures["anonymous_bytes_per_hour"] - 7200) < 100
    assert figures["fds_per_hour"] == 0


def test_short_lives_have_no_slope() -> None:
    trend = Trend(10.0)
    trend.add(Sample(0.0, 1, 5, 5))
    assert trend.figures() == {
        "processes": 1,
        "samples": 0,
        "observed_s": 0,
        "anonymous_bytes_per_hour": 0,
        "fds_per_hour": 0,
    }


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
