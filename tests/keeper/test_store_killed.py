"""The store is killed, its keeper lives: nobody loses anything."""

from __future__ import annotations

import os
import signal

import pytest
from support.waiting import open_fds, process_state, wait_until

from shared_store.base.checkpoint import file_id
from shared_store.base.errors import ConnectionLostError, TimedOutError

ONE, OTHER = "a" * 64, "b" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]


def back(client, pid):
    """Wait until a client is connected to a store that is not this one."""
    wait_until(lambda: client.alive() and client.store_pid() != pid, "the client to be back")


def readers(kept, key=ONE):
    return {model.key: model.readers for model in kept.status().models}.get(key)


def test_store_killed_under_readers(kept, actor):
    """Who reads is counted again by the next store, and has had its bytes all along; a new reader attaches."""
    publisher, reader = actor(), actor()
    publisher.publish(key=ONE, model=MODEL)
    reader.open(key=ONE, publish=False)
    before = kept.status()
    pid = kept.kill_store()
    assert reader.digests() == reader.expected()
    late = actor()  # while there is no store: it waits for its greeting
    assert late.open(key=ONE, publish=False) == "attached"
    assert late.digests() == late.expected()
    back(publisher, pid)
    back(reader, pid)
    after = kept.status()
    assert readers(kept) == 3
    assert after.totals.resident_bytes == before.totals.resident_bytes
    assert (after.keeper.pid, after.keeper.restarts) == (kept.pid, 1)
    assert after.store.recovering


def test_store_killed_again_and_again(kept, actor):
    """The third restart brings back as much as the first, and no process gathers fds."""
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)

    def held():
        return [open_fds(pid) for pid in (kept.pid, publisher.pid, kept.store_pid)]

    first = None
    for _ in range(3):
        pid = kept.kill_store()
        back(publisher, pid)
        wait_until(lambda: readers(kept) == 1, "the reader to be counted")
        wait_until(lambda: kept.status().catalog.state == "ok", "the catalog, which has fds too")
        first = first or held()

    def as_at_first():
        *lasting, store = held()
        return lasting == first[:2] and store <= first[2]  # which may have counted a connection that was ending

    wait_until(as_at_first, "the fds of the first time")


def test_shared_blob_over_a_restart(kept, actor):
    """Two models that share a blob share it afterwards; removing one leaves the other whole, removing both nothing."""
    first, second = actor(), actor()
    first.publish(key=ONE, model=MODEL)
    second.publish(key=OTHER, model=[MODEL[1], [3, 200_000]])
    resident = kept.status().totals.resident_bytes
    pid = kept.kill_store()
    back(first, pid)
    back(second, pid)
    assert kept.status().totals.resident_bytes == resident
    first.leave(key=ONE)
    first.remove(key=ONE)
    late = actor()
    late.open(key=OTHER, publish=False)
    assert late.digests() == late.expected()
    pid = kept.kill_store()
    back(late, pid)
    back(second, pid)
    assert readers(kept, OTHER) == 2
    late.leave(key=OTHER)
    second.leave(key=OTHER)
    second.remove(key=OTHER)
    assert kept.status().totals.resident_bytes == 0
    kept.kill_store()
    assert kept.status().models == ()
    assert kept.status().totals.resident_bytes == 0


def test_many_models_over_a_restart(kept, actor):
    """What is held may be more than a socket takes at once: the next store is sent all of it."""
    publisher = actor()
    keys = [f"{number:064x}" for number in range(20)]
    for key in keys:
        publisher.open(key=key)
        publisher.plan(key=key, model=MODEL)
        publisher.fill(key=key)
        publisher.unmap()
        publisher.commit(key=key, state={"text": "x" * 100_000})
    pid = kept.kill_store()
    back(publisher, pid)
    wait_until(lambda: all(readers(kept, key) == 1 for key in keys), "all models to have their reader")


def test_store_killed_while_a_reader_waits(kept, actor):
    """An `Open` that waits for a publisher is asked again; with the publisher cut off, it is granted."""
    publisher, waiter = actor(), actor()
    assert publisher.open(key=ONE) == "granted"
    waiter.begin("open", key=ONE)
    wait_until(lambda: any(one.role == "waiting" for one in kept.status().clients), "the reader to wait")
    kept.kill_store()
    assert waiter.finish() == "granted"


def test_store_killed_while_a_client_publishes(kept, actor):
    """The publisher is told, its half model is gone, and it may begin anew."""
    publisher = actor()
    publisher.open(key=ONE)
    publisher.plan(key=ONE, model=MODEL)
    kept.kill_store()
    with pytest.raises(ConnectionLostError):
        publisher.fill(key=ONE)
    assert kept.status().totals.resident_bytes == 0
    again = actor()
    assert again.publish(key=ONE, model=MODEL) == "granted"


def test_a_lease_is_held_over_a_restart(kept, actor):
    """Its holder has it from the next store; nobody else gets it until it is given back."""
    holder = actor()
    holder.acquire_for_good(lease="gpu")
    pid = kept.kill_store()
    back(holder, pid)
    with pytest.raises(TimedOutError):
        actor().acquire_for_good(lease="gpu", timeout_s=0.2)
    holder.kill()
    actor().acquire_for_good(lease="gpu")


def test_digests_of_files_over_a_restart(kept, directory):
    """What clients told of checkpoint files is known to the next store, so that no byte is read again."""
    path = directory / "weights"
    path.write_bytes(b"w" * 1000)
    file = file_id(path)
    client = kept.client()
    client.session.remember_files([(file, b"d" * 32)])
    client.session.status()  # answered after it was told to the keeper
    kept.kill_store()
    assert kept.client().session.recall_files([file]) == [b"d" * 32]


def test_store_hangs(start_kept, actor):
    """One that is stopped is killed once it has been silent for the watchdog's time, and clients are back."""
    kept = start_kept(watchdog_s=1.5)
    reader = actor()
    reader.publish(key=ONE, model=MODEL)
    pid = kept.store_pid
    os.kill(pid, signal.SIGSTOP)
    back(reader, pid)
    assert f"no message from the store (pid {pid}) for 1.5 s" in kept.log()
    wait_until(lambda: readers(kept) == 1, "the reader to be counted")


def test_a_slow_start_is_no_hang(start_kept, tmp_path, monkeypatch):
    """A watchdog shorter than a start must not keep stores from ever coming up."""
    slow = "import sys, time\nif 'shared_store.daemon' in sys.orig_argv:\n    time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kept = start_kept(watchdog_s=1.0)
    assert "store hung" not in kept.log()


def test_store_that_dies_again_and_again_is_started_later(kept):
    """After a few short lives in a row it is started after a delay, and the log says so."""
    for _ in range(5):
        kept.kill_store()
    assert kept.status().keeper.restarts == 5
    assert "it keeps dying" in kept.log()


def test_stop_leaves_nothing_behind(kept, actor):
    """SIGTERM to the keeper ends both with exit code 0; no socket, no journal, no process."""
    actor().publish(key=ONE, model=MODEL)
    store = kept.store_pid
    assert kept.stop() == 0
    assert process_state(store) == ""
    assert {path.name for path in kept.directory.iterdir()}.isdisjoint({"store.sock", "journal", "journal.new"})
