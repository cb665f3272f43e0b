"""The cost of ending references: what other owners have is not visited."""

from __future__ import annotations

import pytest

from shared_store.base.manifest import Blob
from shared_store.store.state.segments import Segments

BLOBS = [Blob(bytes([number]) * 32, 512) for number in range(4)]


class NotWalked(dict):
    """A dictionary that fails when it is iterated."""

    def _walked(self):
        raise AssertionError("all entries were iterated")

    __iter__ = keys = values = items = _walked


def two_owners():
    """One segment with two blobs of `a`, one of `b`, and one of both."""
    segments = Segments({})
    segments.take_back(1, "cpu", 2 << 20)
    segments.adopt("a", "cpu", BLOBS[:3], [(1, 0), (1, 512), (1, 1024)])
    segments.adopt("b", "cpu", BLOBS[2:], [(1, 1024), (1, 1536)])
    segments.blobs._entries = {device: NotWalked(known) for device, known in segments.blobs._entries.items()}
    segments._entries = NotWalked(segments._entries)
    return segments


def test_an_iteration_over_all_entries_is_found():
    with pytest.raises(AssertionError, match="all entries were iterated"):
        two_owners().sweep()


def test_dropping_an_owner_visits_its_own_references_alone():
    segments = two_owners()
    assert segments.drop("a") == []
    assert [segments.blobs.get("cpu", blob.digest) is None for blob in BLOBS] == [True, True, False, False]
    assert segments.drop("b") == [1]


def test_renaming_an_owner_visits_its_own_references_alone():
    segments = two_owners()
    segments.rename("a", "a/withdrawn 1")
    assert segments.owners(1) == {"a/withdrawn 1", "b"}
    assert segments.drop("a") == []
    assert segments.drop("b") == []
    assert segments.drop("a/withdrawn 1") == [1]
