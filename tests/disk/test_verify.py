"""`wooly verify` finds a changed byte in the store, and the segment is quarantined."""

from __future__ import annotations

import json

import pytest
from support.content import key
from support.saved import UNSEALED, turn_a_bit
from support.waiting import wait_until

from shared_store.base.errors import WoolyError

ONE, OTHER, THIRD = key(1), key(2), key(3)
BASE = [[1, 3 << 20], [2, 1000]]


@pytest.fixture
def store(start_store, directory):
    """Start a store whose segments can be written to after the commit, without a catalog."""
    return start_store(redis_url=f"unix://{directory}/away", program=UNSEALED)


def published(store, model_key, model):
    """Publish a model as a client that then disconnects."""
    client = store.client()
    client.publish(model_key, model)
    client.leave(model_key)
    client.unmap_all()
    client.close()


def test_models_that_match(store, wooly, session):
    """Exit code 0; shared blobs are digested once; no reader is left."""
    published(store, ONE, BASE)
    published(store, OTHER, [*BASE, [3, 5000], [3, 5000]])
    done = wooly("verify", "--all", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(one["key"], one["blobs"], one["bytes"], one["result"]) for one in found] == [
        (ONE, 2, (3 << 20) + 1000, "ok"),
        (OTHER, 1, 5000, "ok"),
    ]
    assert all(one["seconds"] > 0 for one in found)
    assert [model.readers for model in session.status().models] == [0, 0]
    (alone,) = json.loads(wooly("verify", OTHER, "--json").stdout)
    assert (alone["blobs"], alone["mismatched"]) == (3, [])
    lines = [line.split() for line in wooly("verify", OTHER).stdout.splitlines()]
    assert lines[0] == ["KEY", "MODEL", "DEVICE", "BLOBS", "SIZE", "SECONDS", "RESULT"]
    assert (lines[1][3], lines[1][-1]) == ("3", "ok")


def test_a_changed_byte_is_found_and_its_segment_quarantined(store, wooly, session, directory):
    """Exit code 11; models with blobs in it are withdrawn and published again, others stay; readers go on."""
    published(store, ONE, BASE)
    published(store, OTHER, [*BASE, [3, 5000]])
    published(store, THIRD, [[4, 7000]])
    reader = store.client()
    assert reader.open(ONE) == "attached"
    turn_a_bit(directory, ONE, blob=1)
    done = wooly("verify", "--all", "--json")
    assert done.returncode == 11
    assert done.stderr.endswith("[digest_mismatch]\n")
    results = {one["key"]: (one["result"], one["mismatched"]) for one in json.loads(done.stdout)}
    assert results[ONE] == ("mismatch", [reader.expected()[1]])
    assert results[OTHER] == ("gone", [])  # it shares the segment
    assert results[THIRD] == ("ok", [])
    assert [model.key for model in session.status().models] == [THIRD]
    assert "quarantined" in store.log()

    assert reader.alive()
    assert reader.digests()[0] == reader.expected()[0]
    publisher = store.client()
    assert publisher.publish(ONE, BASE) == "granted"
    assert publisher.digests() == publisher.expected()
    assert wooly("verify", "--all").returncode == 0
    resident = session.status().totals.resident_bytes
    assert [segment.readers for segment in session.status().quarantine] == [1]
    reader.unmap_all()
    reader.close()
    wait_until(lambda: session.status().quarantine == (), "the segment to be released with its last reader")
    assert session.status().totals.resident_bytes < resident


def test_a_publisher_with_a_quarantined_blob_plans_again(store, wooly, directory):
    """Its plan refers to the quarantined segment: the commit is refused, and the second plan succeeds."""
    published(store, ONE, BASE)
    publisher = store.client()
    assert publisher.open(OTHER) == "granted"
    assert publisher.plan(OTHER, [*BASE, [3, 5000]]) == [False, False, True]
    publisher.fill(OTHER)
    publisher.unmap()
    turn_a_bit(directory, ONE)
    assert wooly("verify", ONE).returncode == 11
    with pytest.raises(WoolyError):
        publisher.commit(OTHER)
    assert publisher.plan(OTHER, [*BASE, [3, 5000]]) == [True, True, True]
    publisher.fill(OTHER)
    publisher.unmap()
    publisher.commit(OTHER)
    assert publisher.digests() == publisher.expected()


def test_a_changed_model_is_not_saved(store, wooly, session, directory, tmp_path):
    """Saving verifies first: exit code 11, no directory, and the model is withdrawn."""
    published(store, ONE, BASE)
    turn_a_bit(directory, ONE)
    done = wooly("save", ONE, "--to", tmp_path / "saved")
    assert (done.returncode, done.stdout) == (11, "")
    assert list(tmp_path.iterdir()) == []
    assert session.status().models == ()


@pytest.mark.usefixtures("store")
def test_misuse(wooly):
    """Neither KEY nor --all, both of them, or an unknown key are errors; an empty store is none."""
    assert wooly("verify").returncode == 2
    assert wooly("verify", ONE, "--all").returncode == 2
    assert wooly("verify", ONE).returncode == 9
    done = wooly("verify", "--all")
    assert (done.returncode, done.stdout) == (0, "the store has no models\n")
