"""The transition table of models, and the queues of turns."""

from __future__ import annotations

import itertools

import pytest

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, NotPublisherError, ProtocolError
from shared_store.store.state.effects import HasTurn, MayPublish, MayRead, Refused
from shared_store.store.state.models import TRANSITIONS, Action, Asker, Dropped, Event, Models, State
from shared_store.store.state.turns import Turns


@pytest.fixture
def models():
    return Models()


def ask(models, client, *, publish=True, key="k"):
    return models.open(key, Asker(client, publish), name="m", engine="e", device="cpu")


def test_every_state_has_a_way_in_and_out():
    assert {state for state, _ in TRANSITIONS} == {state for state, _ in TRANSITIONS.values()} == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert {action for _, action in TRANSITIONS.values()} == set(Action)


def test_an_open_is_answered_in_every_state_of_a_model_with_a_key():
    assert all(((state, Event.OPEN) in TRANSITIONS) is (state is not State.WITHDRAWN) for state in State)


def test_the_first_client_publishes_and_the_others_wait_in_order(models):
    assert ask(models, 1) == [MayPublish("k", 1)]
    assert ask(models, 2, publish=False) == ask(models, 3) == ask(models, 4) == []
    assert models.abort("k", 1) == [Dropped("k"), MayPublish("k", 3)]
    assert models.commit("k", 3) == [MayRead("k", 3), MayRead("k", 2), MayRead("k", 4)]
    assert ask(models, 1) == [MayRead("k", 1)]


def test_without_a_successor_all_waiters_are_refused(models):
    ask(models, 1)
    ask(models, 2, publish=False)
    dropped, refused = models.lost(1)
    assert dropped == Dropped("k")
    assert isinstance(refused, Refused)
    assert (refused.client, refused.error.code) == (2, "model_not_found")
    assert models.all() == []


def test_a_waiter_that_disconnects_is_skipped(models):
    for client in (1, 2, 3):
        ask(models, client)
    assert models.lost(2) == []
    assert models.lost(1) == [Dropped("k"), MayPublish("k", 3)]


def test_only_the_publisher_publishes(models):
    ask(models, 1)
    ask(models, 2)
    for call, client in itertools.product((models.publishing, models.commit, models.abort), (2, 3)):
        with pytest.raises(NotPublisherError):
            call("k", client)
    models.commit("k", 1)
    with pytest.raises(NotPublisherError):
        models.commit("k", 1)


def test_an_attaching_client_that_finds_nothing_leaves_no_trace(models):
    with pytest.raises(ModelNotFoundError):
        ask(models, 1, publish=False)
    assert models.all() == []
    assert ask(models, 2) == [MayPublish("k", 2)]


def test_a_client_opens_a_model_once(models):
    ask(models, 1)
    ask(models, 2)
    for client in (1, 2):
        with pytest.raises(ProtocolError):
            ask(models, client)
    models.commit("k", 1)
    with pytest.raises(ProtocolError):
        ask(models, 2)


def test_a_model_in_use_cannot_be_removed(models):
    ask(models, 1)
    with pytest.raises(ModelInUseError):
        models.remove("k")
    models.commit("k", 1)
    with pytest.raises(ModelInUseError):
        models.remove("k")
    models.leave("k", 1)
    assert models.remove("k") == ("k", [Dropped("k")])
    with pytest.raises(ModelNotFoundError):
        models.remove("k")


def test_a_turn_passes_on_in_order():
    turns = Turns()
    assert [turns.acquire("one", client) for client in (1, 2, 3)] == [True, False, False]
    assert turns.acquire("two", 2)
    assert turns.leave("one", 2) == []  # it only leaves the queue
    assert turns.holder("one") == 1
    assert turns.lost(1) == [HasTurn("one", 3)]
    assert turns.leave("one", 3) == []
    assert turns.holder("one") is None
    assert turns.lost(2) == []


def test_a_client_joins_a_queue_once():
    turns = Turns()
    turns.acquire("one", 1)
    with pytest.raises(ValueError, match="before"):
        turns.acquire("one", 1)
    assert turns.leave("other", 1) == []
