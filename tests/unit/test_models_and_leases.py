"""The state tables of models and leases, without memory or sockets."""

from __future__ import annotations

import itertools

import pytest

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, NotPublisherError, ProtocolError
from shared_store.store.state.models import (
    TRANSITIONS,
    Action,
    Asker,
    Attach,
    Dropped,
    Event,
    Granted,
    Models,
    Refused,
    State,
)
from shared_store.store.state.turns import Leases


@pytest.fixture
def models():
    return Models()


def ask(models, client, *, publish=True, key="k"):
    return models.open(key, Asker(client, publish), name="m", engine="e", device="cpu")


def test_every_state_has_a_way_in_and_out():
    assert {state for state, _ in TRANSITIONS} == {state for state, _ in TRANSITIONS.values()} == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert {action for _, action in TRANSITIONS.values()} == set(Action)


def test_an_open_is_answered_in_every_state():
    """But in the one that a model is in when it has no key any more."""
    assert all(((state, Event.OPEN) in TRANSITIONS) is (state is not State.WITHDRAWN) for state in State)


def test_the_first_publishes_and_the_others_wait_in_order(models):
    assert ask(models, 1) == [Granted("k", 1)]
    assert ask(models, 2, publish=False) == ask(models, 3) == ask(models, 4) == []
    assert models.give_up("k", 1) == [Dropped("k"), Granted("k", 3)]
    assert models.commit("k", 3) == [Attach("k", 3), Attach("k", 2), Attach("k", 4)]
    assert ask(models, 1) == [Attach("k", 1)]


def test_without_an_heir_all_who_wait_are_refused(models):
    ask(models, 1)
    ask(models, 2, publish=False)
    dropped, refused = models.lost(1)
    assert dropped == Dropped("k")
    assert isinstance(refused, Refused)
    assert (refused.client, refused.error.code) == (2, "model_not_found")
    assert models.all() == []


def test_a_lost_heir_is_passed_over(models):
    for client in (1, 2, 3):
        ask(models, client)
    assert models.lost(2) == []
    assert models.lost(1) == [Dropped("k"), Granted("k", 3)]


def test_only_the_publisher_publishes(models):
    ask(models, 1)
    ask(models, 2)
    for call, client in itertools.product((models.publishing, models.commit, models.give_up), (2, 3)):
        with pytest.raises(NotPublisherError):
            call("k", client)
    models.commit("k", 1)
    with pytest.raises(NotPublisherError):
        models.commit("k", 1)


def test_an_attaching_client_that_finds_nothing_leaves_no_trace(models):
    with pytest.raises(ModelNotFoundError):
        ask(models, 1, publish=False)
    assert models.all() == []
    assert ask(models, 2) == [Granted("k", 2)]


def test_a_client_asks_once(models):
    ask(models, 1)
    ask(models, 2)
    for client in (1, 2):
        with pytest.raises(ProtocolError):
            ask(models, client)
    models.commit("k", 1)
    with pytest.raises(ProtocolError):
        ask(models, 2)


def test_models_that_are_used_stay(models):
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


def test_leases_pass_on_in_order():
    leases = Leases()
    assert [leases.acquire("one", client) for client in (1, 2, 3)] == [True, False, False]
    assert leases.acquire("two", 2)
    assert leases.leave("one", 2) is None  # out of line
    assert leases.holder("one") == 1
    assert leases.lost(1) == [("one", 3)]
    assert leases.leave("one", 3) is None
    assert leases.holder("one") is None
    assert leases.lost(2) == []


def test_a_lease_is_asked_for_once():
    leases = Leases()
    leases.acquire("one", 1)
    with pytest.raises(ValueError, match="before"):
        leases.acquire("one", 1)
    assert leases.leave("other", 1) is None
