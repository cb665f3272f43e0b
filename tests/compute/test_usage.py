"""Device time by workload: what each is charged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_store.compute.usage import Charge, charge

SECONDS = st.floats(-1, 10, allow_nan=False)
DEVICES = st.frozensets(st.sampled_from(["one", "two", "three"]), max_size=3)
CROWDS = st.dictionaries(st.integers(0, 6), st.tuples(SECONDS, DEVICES), max_size=7)


def charged(crowd, passed):
    busy = {number: seconds for number, (seconds, _) in crowd.items()}
    return charge(busy, {number: devices for number, (_, devices) in crowd.items()}, passed)


@given(CROWDS, SECONDS)
def test_no_device_is_charged_more_than_the_time_that_passed(crowd, passed):
    found = charged(crowd, passed)
    assert set(found) == set(crowd)
    for device in ("one", "two", "three"):
        total = sum(found[number].seconds for number, (_, devices) in crowd.items() if device in devices)
        assert total <= max(0.0, passed) * (1 + 1e-9)
    for number, (seconds, _) in crowd.items():
        assert 0 <= found[number].seconds <= max(0.0, seconds)


@given(CROWDS, SECONDS)
def test_what_does_not_overlap_is_measured(crowd, passed):
    found = charged(crowd, passed)
    for number, (seconds, devices) in crowd.items():
        together = {other for other, (_, theirs) in crowd.items() if devices & theirs or other == number}
        if sum(max(0.0, crowd[other][0]) for other in together) <= passed:
            assert found[number] == Charge(max(0.0, seconds), estimated=False)


def test_what_overlaps_is_divided_in_proportion_and_marked():
    crowd = {1: (0.2, frozenset({"gpu"})), 2: (0.1, frozenset({"gpu"})), 3: (0.2, frozenset({"other"}))}
    found = charged(crowd, 0.2)
    assert found[1].seconds == pytest.approx(0.2 * 2 / 3)
    assert found[2].seconds == pytest.approx(0.1 * 2 / 3)
    assert found[1].estimated
    assert found[2].estimated
    assert found[3] == Charge(0.2, estimated=False)


def test_a_workload_on_several_devices_is_charged_by_the_one_on_which_most_was_done():
    crowd = {1: (0.2, frozenset({"one", "two"})), 2: (0.2, frozenset({"two"}))}
    found = charged(crowd, 0.2)
    assert found[1].seconds == pytest.approx(0.1)
    assert found[2].seconds == pytest.approx(0.1)
