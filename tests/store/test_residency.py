"""The transition table of a segment's residency: every state is reached, and bytes are never nowhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_store.store.state.residency import ON_DEVICE, TRANSITIONS, Action, Event, Residency
from shared_store.store.state.segments import Segments

HELD = {
    Residency.RESIDENT: {"device"},
    Residency.LEAVING: set(),
    Residency.HOST: {"host"},
    Residency.DISK: {"disk"},
    Residency.RETURNING: set(),
}
"""The tiers in which the bytes are complete, at least. While they leave or return, one of both has them."""


@given(st.sampled_from(["host", "disk"]), st.lists(st.sampled_from(Event), max_size=30))
def test_some_tier_has_the_bytes_after_any_events(below, events):
    """What an action releases, another tier has. ``below``: where the host copy is."""
    state, tiers = Residency.RESIDENT, {"device", below}
    for event in events:
        if (state, event) not in TRANSITIONS:
            continue
        if event in (Event.RELEASED, Event.FILED) and event is not (Event.FILED if "disk" in tiers else Event.RELEASED):
            continue
        state, action = TRANSITIONS[state, event]
        if action is Action.RELEASE:
            tiers.discard("device")
        elif action is Action.SHARE:
            tiers.add("device")
        elif action is Action.DROP:
            tiers.add("disk")  # it was written
            tiers.discard("host")
        assert tiers
        assert HELD[state] <= tiers


def test_every_state_event_and_action_is_used():
    """From the resident state, by some events."""
    reached = {Residency.RESIDENT}
    for _ in Residency:
        reached |= {state for (before, _), (state, _) in TRANSITIONS.items() if before in reached}
    assert reached == set(Residency)
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert {action for _, action in TRANSITIONS.values()} == set(Action)


def test_only_memory_of_the_device_counts_for_its_limit():
    assert {Residency.HOST, Residency.DISK} == set(Residency) - ON_DEVICE


@pytest.mark.parametrize("event", [event for event in Event if event is not Event.LEAVE])
def test_a_resident_segment_only_leaves(event):
    """All other events are refused, and change nothing."""
    segments = Segments({})
    segments.take_back(1, "gpu", 2 << 20)
    with pytest.raises(KeyError):
        segments.step(1, event)
    assert segments.at(1).residency is Residency.RESIDENT
