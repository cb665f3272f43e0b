"""Eviction policy and compaction plan, for any snapshot."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shared_store.base.layout import ALIGNMENT, GRANULARITY, round_up
from shared_store.base.manifest import Blob
from shared_store.store.space.compaction_plan import choose
from shared_store.store.space.eviction import CachedModel, evict, evict_one
from shared_store.store.state.compactions import Source
from shared_store.store.state.segment_entry import OccupiedSegment

NAMES = ("a", "b", "c", "d", "e")
MODELS = st.tuples(
    *(
        st.builds(
            CachedModel,
            st.just(name),
            st.integers(0, 3).map(float),
            st.sampled_from([0, 0, 0, 2]),
            st.sampled_from([False, False, False, True]),
        )
        for name in NAMES
    )
)
SEGMENTS = st.lists(
    st.builds(
        OccupiedSegment,
        st.integers(1, 4),
        st.frozensets(st.sampled_from([*NAMES, *NAMES, "b/7 publishes"]), min_size=1, max_size=3),
    ),
    max_size=8,
)


def freed(segments, gone):
    return sum(one.nbytes for one in segments if one.owners <= set(gone))


@given(MODELS, SEGMENTS, st.integers(-2, 20))
def test_eviction_frees_enough_or_nothing(models, segments, needed):
    """Models with readers or pins are not evicted, nor any model whose eviction frees nothing."""
    may = {one.key: one for one in models if not one.readers and not one.pinned}
    chosen = evict(models, segments, needed)
    if chosen is None:
        assert freed(segments, may) < needed
        return
    assert freed(segments, chosen) >= max(0, needed)
    assert set(chosen) <= may.keys()
    assert len(set(chosen)) == len(chosen)
    for one in chosen:
        assert freed(segments, set(chosen) - {one}) < freed(segments, chosen)


@given(MODELS, SEGMENTS, st.integers(1, 20))
def test_eviction_is_in_order_of_least_recent_use(models, segments, needed):
    """Those that were used before the most recently used one that is evicted would not free enough."""
    chosen = evict(models, segments, needed) or ()
    by_key = {one.key: one for one in models}
    assert list(chosen) == sorted(chosen, key=lambda key: (by_key[key].last_used, key))
    if chosen:
        last = (by_key[chosen[-1]].last_used, chosen[-1])
        older = {one.key for one in models if one.evictable and (one.last_used, one.key) < last}
        assert freed(segments, older) < needed


@given(MODELS, SEGMENTS, st.integers(1, 20))
def test_no_more_models_are_evicted_than_needed(models, segments, needed):
    """No proper subset of them would free enough."""
    chosen = evict(models, segments, needed) or ()
    for number in range(len(chosen)):
        for fewer in itertools.combinations(chosen, number):
            assert freed(segments, fewer) < needed


@given(MODELS, SEGMENTS, st.integers(1, 20), st.integers(0, 20))
def test_eviction_one_by_one_ends_with_enough_or_with_all(models, segments, nbytes, free):
    """Where the free bytes are unknown: models are evicted until the allocation fits, in steps that free something."""
    left, gone = list(segments), one_by_one(models, segments, nbytes, free)
    may = {one.key for one in models if one.evictable}
    assert set(gone) <= may
    if freed(left, gone) + free < nbytes:
        assert freed(left, gone) == freed(left, may)


@given(
    MODELS,
    st.lists(
        st.builds(OccupiedSegment, st.integers(1, 4), st.sampled_from(NAMES).map(lambda one: frozenset({one}))),
        max_size=8,
    ),
    st.integers(1, 20),
    st.integers(0, 20),
)
def test_eviction_one_by_one_takes_no_more_than_needed(models, segments, nbytes, free):
    """If models share no segment: no proper subset would have been enough, although that was not known before."""
    gone = one_by_one(models, segments, nbytes, free)
    if freed(segments, gone) + free < nbytes:
        return
    for number in range(len(gone)):
        for fewer in itertools.combinations(gone, number):
            assert freed(segments, fewer) + free < nbytes


def one_by_one(models, segments, nbytes, free):
    """Evict until an allocation fits, as admission does where the free bytes are unknown; the evicted keys."""
    gone, left = [], list(models)
    while freed(segments, gone) + free < nbytes:
        present = [
            OccupiedSegment(one.nbytes, one.owners - set(gone)) for one in segments if not one.owners <= set(gone)
        ]
        chosen = evict_one(left, present, None if gone else nbytes)
        if chosen is None:
            break
        assert freed(segments, [*gone, *chosen]) > freed(segments, gone)
        gone += chosen
        left = [one for one in left if one.key not in chosen]
    return gone


def test_one_model_that_is_surely_enough_is_preferred_in_order_of_last_use():
    segments = [OccupiedSegment(nbytes, frozenset(name)) for nbytes, name in ((2, "a"), (8, "b"), (16, "c"))]
    models = [CachedModel(name, use, 0, pinned=False) for name, use in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    assert evict_one(models, segments, 4) == ("b",)
    assert evict_one(models, segments, 20) == ("c",)
    assert evict_one(models, segments, None) == ("c",)


def test_a_shared_segment_is_freed_with_its_last_owner():
    """Evicting one of two models that share all blobs frees nothing: both are evicted, or an unshared third."""
    segments = [OccupiedSegment(10, frozenset("ab")), OccupiedSegment(10, frozenset("c"))]
    models = [CachedModel(name, use, 0, pinned=False) for name, use in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    assert evict(models, segments, 10) == ("a", "b")
    used = [models[0], CachedModel("b", 2.0, 1, pinned=False), models[2]]
    assert evict(used, segments, 10) == ("c",)
    assert evict(used, segments, 11) is None


@st.composite
def sources(draw):
    """Segments with gaps between their blobs, as removed blobs leave them."""
    found = []
    for segment in range(1, draw(st.integers(0, 6)) + 1):
        end, blobs = 0, []
        for number in range(draw(st.integers(1, 4))):
            start = round_up(end + draw(st.sampled_from([0, 0, 100, GRANULARITY, 3 * GRANULARITY])), ALIGNMENT)
            nbytes = draw(st.sampled_from([0, 1, 700, 100_000, GRANULARITY, GRANULARITY + 1]))
            blobs.append((Blob(bytes([segment, number]), nbytes), start))
            end = start + nbytes
        size = max(round_up(end, GRANULARITY), GRANULARITY)
        found.append(Source(segment, size, tuple(blobs)))
    return found


@given(sources(), st.integers(0, 12), st.sampled_from([1, 2, 8]))
def test_a_compaction_plan(found, room, target):
    """All blobs of the chosen segments move, without overlap, into less memory than before and within the bounds."""
    by_id = {source.segment: source for source in found}
    plan = choose(found, free=room * GRANULARITY, target=target * GRANULARITY)
    if plan is None:
        return
    chosen = [by_id[segment] for segment in plan.sources]
    assert plan.nbytes <= room * GRANULARITY
    assert len(chosen) == 1 or plan.nbytes <= target * GRANULARITY
    assert plan.gain == sum(source.nbytes for source in chosen) - plan.nbytes > 0
    moved = {(move.blob, move.source, move.start) for move in plan.moves}
    assert moved == {(blob, source.segment, start) for source in chosen for blob, start in source.blobs}
    end = 0
    for move in sorted(plan.moves, key=lambda move: (move.offset, move.blob.nbytes)):
        assert move.offset % ALIGNMENT == 0
        assert move.offset >= end
        end = move.offset + move.blob.nbytes
    assert end <= plan.nbytes


@given(sources())
def test_repeated_compaction_ends_when_nothing_more_is_gained(found):
    """Each step needs less memory than before. In the end every segment is as small as its blobs allow."""
    left, steps = {source.segment: source for source in found}, 0
    while plan := choose(list(left.values()), free=1 << 40):
        steps += 1
        for segment in plan.sources:
            del left[segment]
        left[1000 + steps] = Source(1000 + steps, plan.nbytes, tuple((move.blob, move.offset) for move in plan.moves))
    assert all(source.nbytes == max(round_up(source.span, GRANULARITY), GRANULARITY) for source in left.values())
    assert {blob for source in left.values() for blob, _ in source.blobs} == {
        blob for source in found for blob, _ in source.blobs
    }
