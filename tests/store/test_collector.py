"""The collector excludes what publications left from full collections, and nothing leaks through it."""

from __future__ import annotations

import gc
import weakref

import pytest

from shared_store.store.collector import PUBLICATIONS, Collector


class Node:
    """An object that can refer to itself."""


@pytest.fixture
def collector():
    before = gc.get_threshold()
    yield Collector()
    gc.set_threshold(*before)
    gc.unfreeze()


def test_publications_are_excluded_after_a_number_of_them(collector):
    for _ in range(PUBLICATIONS - 1):
        collector.event("published", key="a")
        collector.event("attached", key="a")
    assert gc.get_freeze_count() == 0
    collector.event("published", key="a")
    assert gc.get_freeze_count() > 1000


def test_excluded_objects_are_freed_by_their_reference_counts(collector):
    kept = Node()
    gone = weakref.ref(kept)
    collector.settle()
    del kept
    assert gone() is None


def test_young_cycles_are_freed_before_the_rest_is_excluded(collector):
    cycle = Node()
    cycle.itself = cycle
    gone = weakref.ref(cycle)
    del cycle
    collector.settle()
    assert gone() is None


def test_cycles_that_are_made_afterwards_are_collected(collector):
    collector.settle()
    cycle = Node()
    cycle.itself = cycle
    gone = weakref.ref(cycle)
    del cycle
    gc.collect()
    assert gone() is None
