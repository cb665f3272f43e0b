"""SIGKILL to the keeper, alone and together with the store."""

from __future__ import annotations

import os
import signal

import pytest
from support.stores import KeptStore
from support.waiting import open_segments, wait_until

from shared_store.keeper.journal import read
from shared_store.protocol.durable_state import DurableState

ONE, OTHER = "a" * 64, "b" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]


def readers(kept, key=ONE):
    return {model.key: model.readers for model in kept.status().models}.get(key)


def journal_state(kept):
    """Return segments and models as recorded in the journal."""
    state = DurableState()
    for change in read(kept.paths.journal)[0]:
        state.apply(change)
    return state.segments, state.models


@pytest.fixture
def start_again(kept):
    """Start another keeper and store in the same directory, after :meth:`KeptStore.kill_both`."""
    started = []

    def start():
        started.append(KeptStore(kept.directory))
        return started[-1].start()

    yield start
    for one in started:
        one.clean_up()


def test_keeper_killed_alone(kept, actor):
    """The store continues, and starts another keeper, which retains as many segments as the first."""
    reader = actor()
    reader.publish(key=ONE, model=MODEL)
    store, segments = kept.store_pid, open_segments(kept.pid)
    assert segments > 0
    os.kill(kept.pid, signal.SIGKILL)
    kept.wait()
    wait_until(lambda: kept.status().keeper.pid != kept.pid, "another keeper")
    wait_until(lambda: kept.status().keeper.state == "ok", "the keeper to have taken over")
    status = kept.status()
    assert status.store.pid == store
    assert open_segments(status.keeper.pid) == segments
    late = actor()
    late.open(key=ONE, publish=False)
    assert late.digests() == late.expected()
    kept.kill_store()  # the new keeper restarts the store as the first did
    wait_until(lambda: readers(kept) == 2, "both readers to rejoin")
    assert kept.status().keeper.pid == status.keeper.pid


def test_model_published_without_a_keeper_is_retained_by_the_next(kept, actor):
    """A commit while no keeper is running reaches the next keeper."""
    publisher = actor()
    os.kill(kept.pid, signal.SIGKILL)
    kept.wait()
    publisher.publish(key=ONE, model=MODEL)
    wait_until(lambda: kept.status().keeper.state == "ok", "the keeper to have taken over")
    pid = kept.kill_store()
    wait_until(lambda: publisher.store_pid() != pid and publisher.alive(), "the reader to rejoin")
    assert readers(kept) == 1


def test_both_killed(kept, start_again, actor):
    """Several clients return a model at once. No client loads it, and the new keeper retains it."""
    first, second = actor(), actor()
    first.publish(key=ONE, model=MODEL)
    second.open(key=ONE, publish=False)
    resident = kept.status().totals.resident_bytes
    kept.kill_both()
    assert second.digests() == second.expected()
    again = start_again()
    late = actor()
    assert late.open(key=ONE, publish=True) == "attached"  # queued until a client returns the model
    assert late.digests() == late.expected()
    wait_until(lambda: readers(again) == 3, "all readers to rejoin")
    status = again.status()
    assert (status.totals.resident_bytes, status.counters.publishes) == (resident, 0)
    segments = status.devices[0].segments
    wait_until(lambda: open_segments(again.pid) == segments, "the store to close what it sent")
    again.kill_store()
    wait_until(lambda: readers(again) == 3, "all readers to rejoin after another restart")


def test_both_killed_with_models_that_share(kept, start_again, actor):
    """A segment with blobs of two models is returned once."""
    first, second = actor(), actor()
    first.publish(key=ONE, model=MODEL)
    second.publish(key=OTHER, model=[MODEL[1], [3, 200_000]])
    resident = kept.status().totals.resident_bytes
    kept.kill_both()
    again = start_again()
    wait_until(lambda: (readers(again), readers(again, OTHER)) == (1, 1), "both models to be returned")
    assert again.status().totals.resident_bytes == resident


def test_both_killed_without_the_journal(kept, start_again, actor):
    """Clients can return models without a journal: the store verifies host memory by digests."""
    reader = actor()
    reader.publish(key=ONE, model=MODEL)
    kept.kill_both()
    kept.paths.journal.unlink()
    again = start_again()
    wait_until(lambda: readers(again) == 1, "the reader to rejoin")


def test_no_client_has_the_model(kept, start_again, actor):
    """A model of the journal that no client returns is forgotten, and the next client publishes it."""
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    kept.kill_both()
    publisher.kill()
    again = start_again()
    late = actor()
    assert late.open(key=ONE) == "granted"
    assert again.status().totals.resident_bytes == 0
    wait_until(lambda: journal_state(again) == ({}, {}), "the journal to be empty")
