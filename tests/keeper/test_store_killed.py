"""SIGKILL to the store under a keeper: no client loses a model."""

from __future__ import annotations

import os
import signal

import pytest
from support.waiting import open_fds, process_state, wait_until

from shared_store.base.checkpoint import file_id
from shared_store.base.errors import ConnectionLostError, TimedOutError

ONE, OTHER = "a" * 64, "b" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]


def reconnected(client, pid):
    """Wait until a client is connected to another store than this one."""
    wait_until(lambda: client.alive() and client.store_pid() != pid, "the client to reconnect")


def readers(kept, key=ONE):
    return {model.key: model.readers for model in kept.status().models}.get(key)


def test_store_killed_under_readers(kept, actor):
    """Readers keep their bytes and rejoin the next store. A new reader attaches."""
    publisher, reader = actor(), actor()
    publisher.publish(key=ONE, model=MODEL)
    reader.open(key=ONE, publish=False)
    before = kept.status()
    pid = kept.kill_store()
    assert reader.digests() == reader.expected()
    late = actor()  # without a store, it waits for the greeting
    assert late.open(key=ONE, publish=False) == "attached"
    assert late.digests() == late.expected()
    reconnected(publisher, pid)
    reconnected(reader, pid)
    after = kept.status()
    assert readers(kept) == 3
    assert after.totals.resident_bytes == before.totals.resident_bytes
    assert (after.keeper.pid, after.keeper.restarts) == (kept.pid, 1)
    assert after.store.recovering


def test_store_killed_three_times(kept, actor):
    """Every restart restores the model, and no process leaks fds."""
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)

    def fds():
        return [open_fds(pid) for pid in (kept.pid, publisher.pid, kept.store_pid)]

    first = None
    for _ in range(3):
        pid = kept.kill_store()
        reconnected(publisher, pid)
        wait_until(lambda: readers(kept) == 1, "the reader to rejoin")
        wait_until(lambda: kept.status().catalog.state == "ok", "the catalog, which has fds too")
        first = first or fds()

    def as_at_first():
        *lasting, store = fds()
        return lasting == first[:2] and store <= first[2]  # the first count may include a closing connection

    wait_until(as_at_first, "the number of fds after the first restart")


def test_shared_blob_over_a_restart(kept, actor):
    """Two models still share a blob after a restart: it is freed when both are removed."""
    first, second = actor(), actor()
    first.publish(key=ONE, model=MODEL)
    second.publish(key=OTHER, model=[MODEL[1], [3, 200_000]])
    resident = kept.status().totals.resident_bytes
    pid = kept.kill_store()
    reconnected(first, pid)
    reconnected(second, pid)
    assert kept.status().totals.resident_bytes == resident
    first.leave(key=ONE)
    first.remove(key=ONE)
    late = actor()
    late.open(key=OTHER, publish=False)
    assert late.digests() == late.expected()
    pid = kept.kill_store()
    reconnected(late, pid)
    reconnected(second, pid)
    assert readers(kept, OTHER) == 2
    late.leave(key=OTHER)
    second.leave(key=OTHER)
    second.remove(key=OTHER)
    assert kept.status().totals.resident_bytes == 0
    kept.kill_store()
    assert kept.status().models == ()
    assert kept.status().totals.resident_bytes == 0


def test_many_models_over_a_restart(kept, actor):
    """The next store gets the whole state, also if it is larger than the socket's buffer."""
    publisher = actor()
    keys = [f"{number:064x}" for number in range(20)]
    for key in keys:
        publisher.open(key=key)
        publisher.plan(key=key, model=MODEL)
        publisher.fill(key=key)
        publisher.unmap()
        publisher.commit(key=key, state={"text": "x" * 100_000})
    pid = kept.kill_store()
    reconnected(publisher, pid)
    wait_until(lambda: all(readers(kept, key) == 1 for key in keys), "the reader to rejoin all models")


def test_store_killed_while_a_reader_waits(kept, actor):
    """A waiting `Open` is repeated, and granted because the publisher lost its connection."""
    publisher, waiter = actor(), actor()
    assert publisher.open(key=ONE) == "granted"
    waiter.begin("open", key=ONE)
    wait_until(lambda: any(one.role == "waiting" for one in kept.status().clients), "the reader to wait")
    kept.kill_store()
    assert waiter.finish() == "granted"


def test_store_killed_while_a_client_publishes(kept, actor):
    """The publisher gets an error, its segments are released, and it may publish again."""
    publisher = actor()
    publisher.open(key=ONE)
    publisher.plan(key=ONE, model=MODEL)
    kept.kill_store()
    with pytest.raises(ConnectionLostError):
        publisher.fill(key=ONE)
    assert kept.status().totals.resident_bytes == 0
    again = actor()
    assert again.publish(key=ONE, model=MODEL) == "granted"


def test_turn_over_a_restart(kept, actor):
    """The client keeps its turn. Another client gets it only after the first one ends."""
    holder = actor()
    holder.acquire_for_good(lease="gpu")
    pid = kept.kill_store()
    reconnected(holder, pid)
    with pytest.raises(TimedOutError):
        actor().acquire_for_good(lease="gpu", timeout_s=0.2)
    holder.kill()
    actor().acquire_for_good(lease="gpu")


def test_digests_of_files_over_a_restart(kept, directory):
    """The next store has the digests that clients reported."""
    path = directory / "weights"
    path.write_bytes(b"w" * 1000)
    file = file_id(path)
    client = kept.client()
    client.session.remember_files([(file, b"d" * 32)])
    client.session.status()  # answered after the digests were sent to the keeper
    kept.kill_store()
    assert kept.client().session.recall_files([file]) == [b"d" * 32]


def test_hanging_store(start_kept, actor):
    """A stopped store is killed after the watchdog's time, and clients reconnect."""
    kept = start_kept(watchdog_s=1.5)
    reader = actor()
    reader.publish(key=ONE, model=MODEL)
    pid = kept.store_pid
    os.kill(pid, signal.SIGSTOP)
    reconnected(reader, pid)
    assert f"no message from the store (pid {pid}) for 1.5 s" in kept.log()
    wait_until(lambda: readers(kept) == 1, "the reader to rejoin")


def test_slow_start_is_not_a_hang(start_kept, tmp_path, monkeypatch):
    """A watchdog shorter than a start does not kill a starting store."""
    slow = "import sys, time\nif 'shared_store.daemon' in sys.orig_argv:\n    time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kept = start_kept(watchdog_s=1.0)
    assert "store hung" not in kept.log()


def test_store_that_keeps_dying_is_restarted_with_a_delay(kept):
    """After several short lives in a row the restart is delayed, and the log has the reason."""
    for _ in range(5):
        kept.kill_store()
    assert kept.status().keeper.restarts == 5
    assert "it keeps dying" in kept.log()


def test_stop_leaves_nothing_behind(kept, actor):
    """SIGTERM to the keeper ends both processes with exit code 0, and removes socket and journal."""
    actor().publish(key=ONE, model=MODEL)
    store = kept.store_pid
    assert kept.stop() == 0
    assert process_state(store) == ""
    assert {path.name for path in kept.directory.iterdir()}.isdisjoint({"store.sock", "journal", "journal.new"})
