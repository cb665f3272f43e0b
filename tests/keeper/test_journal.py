"""The journal: damaged files, and disks that cannot be written."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stores import KeptStore
from support.waiting import wait_until

from shared_store.base.checkpoint import FileId
from shared_store.keeper import journal
from shared_store.keeper.journal import MAGIC, Journal, boot_id, read, record
from shared_store.protocol import handover, keeper_messages
from shared_store.protocol.durable_state import DurableState

ONE = "a" * 64
MODEL = [[1, 300_000], [2, 3 << 20]]

numbers = st.integers(1, 5)
keys = st.sampled_from(["k1", "k2", "k3"])
places = st.lists(st.tuples(numbers, st.integers(0, 1 << 40)), max_size=3).map(tuple)
files = st.tuples(st.integers(0, 3), st.builds(FileId, *[st.integers(0, 9)] * 5), st.binary(min_size=32, max_size=32))
changes = st.one_of(
    st.builds(
        keeper_messages.Hold,
        st.builds(keeper_messages.SegmentRecord, numbers, st.sampled_from(["cpu", "GPU-1"]), numbers),
    ),
    st.builds(keeper_messages.Release, numbers),
    st.builds(
        keeper_messages.NoteModel,
        st.builds(keeper_messages.ModelRecord, keys, st.binary(max_size=9), places, st.booleans()),
    ),
    st.builds(keeper_messages.ForgetModel, keys),
    st.builds(keeper_messages.NoteFiles, st.lists(files, max_size=3).map(tuple)),
)


def state(held):
    return {number: one.record for number, one in held.segments.items()}, held.models, dict(held.files)


def applied(history):
    held = DurableState()
    for change in history:
        held.apply(change)
    return held


@given(st.lists(st.one_of(changes, st.just("rewrite")), max_size=20))
def test_what_was_written_is_read(tmp_path_factory, history):
    """The journal restores the state, with any number of rewrites in between. So does a handover."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    held, written = DurableState(), Journal(path)
    written.rewrite([])
    for change in history:
        if change == "rewrite":
            written.rewrite(one for one, _ in held.changes())
        else:
            held.apply(change)
            written.append(change)
    written.close()
    found, damage = read(path)
    assert (state(applied(found)), damage, written.reason) == (state(held), "", "")
    copied = DurableState()
    for payload, _ in handover.changes_of(held):
        copied.apply(keeper_messages.decode_state(payload))
    assert state(copied) == state(held)


@given(st.lists(changes, min_size=1, max_size=6), st.data())
def test_torn_tail(tmp_path_factory, history, data):
    """Complete records before the cut are read. Damage is reported unless the cut is between records."""
    records = [record(change) for change in history]
    whole = b"".join(records)
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.write_bytes(MAGIC + boot_id() + whole[:cut])
    found, damage = read(path)
    ends = [sum(map(len, records[:count])) for count in range(len(records) + 1)]
    kept = max(count for count, end in enumerate(ends) if end <= cut)
    assert found == history[:kept]
    assert bool(damage) == (cut not in ends)


@given(st.lists(changes, min_size=1, max_size=6), st.data())
def test_flipped_bit(tmp_path_factory, history, data):
    """A record with a flipped bit is ignored, and so are all records after it."""
    records = [record(change) for change in history]
    which = data.draw(st.integers(0, len(records) - 1))
    bad = bytearray(records[which])
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.write_bytes(MAGIC + boot_id() + b"".join([*records[:which], bytes(bad), *records[which + 1 :]]))
    found, damage = read(path)
    assert found == history[:which]
    assert damage


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"something else", "not a journal of this version"),
        (
            MAGIC + b"00000000-0000-0000-0000-000000000000\n" + record(keeper_messages.Release(1)),
            "before this machine was rebooted",
        ),
    ],
    ids=["foreign", "of another boot"],
)
def test_foreign_journal(tmp_path, data, why):
    """It is ignored as a whole."""
    path = tmp_path / "journal"
    path.write_bytes(data)
    found, damage = read(path)
    assert found == []
    assert why in damage


def test_symbolic_link_as_journal(tmp_path):
    """It is not followed, neither to read nor to write."""
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    path = tmp_path / "journal"
    path.symlink_to(target)
    found, damage = read(path)
    assert (found, bool(damage)) == ([], True)
    written = Journal(path)
    written.rewrite([keeper_messages.Release(1)])
    written.close()
    assert target.read_bytes() == b"precious"
    assert read(path) == ([keeper_messages.Release(1)], "")


def test_history_is_dropped(tmp_path, monkeypatch):
    """A file that is mostly history is due for a rewrite. A large file without history is not."""
    monkeypatch.setattr(journal, "COMPACT_FROM", 1000)
    written = Journal(tmp_path / "journal")
    model = keeper_messages.ModelRecord(ONE, b"m" * 500, ())
    written.rewrite([keeper_messages.NoteModel(model)] * 4)
    assert not written.due()
    for _ in range(5):
        written.append(keeper_messages.NoteModel(model))
    assert written.due()
    written.rewrite([keeper_messages.NoteModel(model)])
    assert not written.due()
    written.close()


def test_disk_full(tmp_path):
    """Writing stops at the first failure, with a reason, and a rewrite completes the file later."""
    written = Journal(tmp_path / "journal")
    written.rewrite([keeper_messages.Release(1)])
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(full, written._fd.fileno(), inheritable=False)
    os.close(full)
    written.append(keeper_messages.Release(2))
    assert "No space left" in written.reason
    written.append(keeper_messages.Release(3))
    assert read(tmp_path / "journal") == ([keeper_messages.Release(1)], "")
    written.rewrite([keeper_messages.Release(3)])
    assert written.reason == ""
    assert read(tmp_path / "journal") == ([keeper_messages.Release(3)], "")
    written.close()


def test_store_without_a_journal(directory, actor):
    """If the journal cannot be written, the store serves and is `degraded`; it is `ok` after a rewrite."""
    obstacle = directory / "journal.new"
    obstacle.mkdir()
    kept = KeptStore(directory).start()
    try:
        publisher = actor()
        publisher.publish(key=ONE, model=MODEL)
        status = kept.status()
        assert (status.store.state, status.keeper.journal) == ("degraded", "degraded")
        assert any("journal" in reason for reason in status.store.reasons)
        pid = kept.kill_store()  # the keeper needs no journal for a restart of the store
        wait_until(lambda: publisher.alive() and publisher.store_pid() != pid, "the reader to rejoin")
        obstacle.rmdir()
        wait_until(lambda: kept.status().keeper.journal == "ok", "the journal to be complete")
        assert ONE in {change.model.key for change in read(kept.paths.journal)[0] if hasattr(change, "model")}
    finally:
        kept.clean_up()


@pytest.mark.parametrize("damage", ["torn", "foreign"])
def test_damaged_journal_of_a_killed_keeper(directory, actor, damage):
    """The next keeper reports the damage, and clients return their models."""
    first = KeptStore(directory).start()
    publisher = actor()
    publisher.publish(key=ONE, model=MODEL)
    first.kill_both()
    data = first.paths.journal.read_bytes()
    first.paths.journal.write_bytes(data[:-3] if damage == "torn" else b"no journal")
    again = KeptStore(directory).start()
    try:
        assert "journal damaged" in again.log()
        wait_until(lambda: any(one.readers == 1 for one in again.status().models), "the reader to rejoin")
    finally:
        again.clean_up()
        first.clean_up()
