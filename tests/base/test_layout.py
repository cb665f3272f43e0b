"""The layout of blobs in segments, for any sizes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_store.base.layout import (
    ALIGNMENT,
    GRANULARITY,
    LEAST_TARGET,
    TARGET,
    Layout,
    Placement,
    pack,
    restrict,
    round_up,
    target_for,
)

SIZES = st.lists(
    st.one_of(
        st.integers(0, 4096), st.integers(0, 3 * GRANULARITY), st.sampled_from([0, 1, 511, 512, 513, GRANULARITY])
    ),
    max_size=60,
)
TARGETS = st.sampled_from([ALIGNMENT, GRANULARITY, 2 * GRANULARITY, TARGET])


@given(SIZES, TARGETS)
def test_blobs_are_aligned_inside_their_segment_and_apart_from_each_other(sizes, target):
    layout = pack(sizes, target=target)
    assert len(layout.placements) == len(sizes)
    free_from = dict.fromkeys(range(len(layout.sizes)), 0)
    for nbytes, place in zip(sizes, layout.placements, strict=True):
        assert place.offset % ALIGNMENT == 0
        assert place.offset >= free_from[place.segment]  # later blobs of a segment begin after earlier ones end
        free_from[place.segment] = place.offset + nbytes
        assert place.offset + nbytes <= layout.sizes[place.segment]


@given(SIZES, TARGETS)
def test_blobs_keep_their_order(sizes, target):
    """A publisher copies and frees in this order, and fills one segment after the other."""
    places = [(place.segment, place.offset) for place in pack(sizes, target=target).placements]
    assert places == sorted(places)


@given(SIZES, TARGETS)
def test_a_segment_exceeds_the_target_only_for_one_large_blob(sizes, target):
    """Sizes are multiples of the granularity, and every segment is used."""
    layout = pack(sizes, target=target)
    assert {place.segment for place in layout.placements} == set(range(len(layout.sizes)))
    for index, size in enumerate(layout.sizes):
        inside = [nbytes for nbytes, place in zip(sizes, layout.placements, strict=True) if place.segment == index]
        assert size % GRANULARITY == 0
        if size > round_up(target, GRANULARITY):
            assert max(inside) > target
            assert sum(nbytes > 0 for nbytes in inside) == 1


@given(SIZES, TARGETS)
def test_waste_is_bounded(sizes, target):
    """Less than the alignment for each blob, and at most the granularity for each segment."""
    layout = pack(sizes, target=target)
    waste = sum(layout.sizes) - sum(sizes)
    assert waste <= len(sizes) * (ALIGNMENT - 1) + len(layout.sizes) * GRANULARITY


@given(SIZES, TARGETS)
def test_a_new_segment_begins_only_where_the_next_blob_would_exceed_the_target(sizes, target):
    """So there are as few segments as the order of the blobs allows."""
    layout = pack(sizes, target=target)
    placed = list(zip(sizes, layout.placements, strict=True))
    for (before, place), (nbytes, following) in itertools.pairwise(placed):
        if following.segment != place.segment:
            assert round_up(place.offset + before, ALIGNMENT) + nbytes > target


def test_no_blobs_need_no_segment():
    assert pack([]).sizes == ()


@given(st.integers(max_value=-1))
def test_a_negative_size_is_refused(nbytes):
    with pytest.raises(ValueError, match="bytes"):
        pack([nbytes])


@given(st.integers(0, 1 << 44))
def test_a_segment_is_small_relative_to_its_model(nbytes):
    """An eighth of it, within limits: small segments make mapping slow, large ones raise the peak of publishing."""
    assert LEAST_TARGET <= target_for(nbytes) <= TARGET
    assert target_for(nbytes) <= max(nbytes / 8, LEAST_TARGET)
    assert target_for(nbytes) == TARGET or nbytes < 8 * (target_for(nbytes) + 1)


def test_a_small_model_is_divided():
    """By default: 512 MiB in equal tensors are eight segments, and 32 MiB are one."""
    assert len(pack([16 << 20] * 32).sizes) == 8
    assert len(pack([1 << 20] * 32).sizes) == 1


@given(SIZES, TARGETS, st.data())
def test_new_blobs_get_their_preferred_placements(sizes, target, data):
    """In segments of the preferred sizes. Segments without new blobs are left out."""
    before = pack(sizes, target=target)
    new = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True)) if sizes else []
    now = restrict(before, sizes, new)
    assert len(now.placements) == len(new)
    old = sorted({before.placements[index].segment for index in new})
    assert now.sizes == tuple(before.sizes[segment] for segment in old)
    for index, spot in zip(new, now.placements, strict=True):
        assert (old[spot.segment], spot.offset) == (before.placements[index].segment, before.placements[index].offset)


@pytest.mark.parametrize(
    ("sizes", "places", "nbytes"),
    [
        ((GRANULARITY,), [(0, 0), (0, 512)], [513, 1]),
        ((GRANULARITY,), [(0, 0)], [GRANULARITY + 1]),
        ((GRANULARITY,), [(0, GRANULARITY)], [1]),
        ((GRANULARITY,), [(1, 0)], [1]),
        ((GRANULARITY,), [(-1, 0)], [1]),
        ((GRANULARITY,), [(0, -512)], [1]),
        ((GRANULARITY,), [(0, 16)], [1]),
        ((GRANULARITY,), [], [1]),
        ((GRANULARITY + 512,), [(0, 0)], [1]),
        ((0,), [(0, 0)], [0]),
    ],
)
def test_an_impossible_preference_is_refused(sizes, places, nbytes):
    """Overlapping, out of the segment, unaligned, without a segment, or in segments of impossible sizes."""
    preferred = Layout(sizes, tuple(Placement(*place) for place in places))
    with pytest.raises(ValueError, match=r"."):
        restrict(preferred, nbytes, range(len(nbytes)))
