"""Who publishes a model, who waits for it, who reads it: a state table, and nothing but state.

A model is absent, being published, or committed. :data:`TRANSITIONS` is the whole of it; :class:`Models` applies it
and returns what has to be done as effects, which the server carries out.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from shared_store.errors import ModelInUseError, ModelNotFoundError, NotPublisherError, ProtocolError, WoolyError


class State(enum.Enum):
    """Where a model is in its life."""

    ABSENT = "absent"
    PUBLISHING = "publishing"
    COMMITTED = "committed"


class Event(enum.Enum):
    """What can happen to a model."""

    OPEN = "open"
    COMMIT = "commit"
    GIVE_UP = "give up"  # the publisher abandons, or its connection is lost
    REMOVE = "remove"
    QUARANTINE = "quarantine"  # some of its bytes are wrong; those who read them go on
    RETURN = "return"  # a store before this one had it committed, and its memory is here


class Action(enum.Enum):
    """What a transition asks for."""

    GRANT = "grant"  # the one who asked publishes
    WAIT = "wait"  # the one who asked waits for the publisher
    ATTACH = "attach"  # the one who asked reads
    ADMIT = "admit"  # the publisher and all who wait read
    PASS_ON = "pass on"  # noqa: S105 - no password; what was written is dropped; the next who may publish does, or nobody does
    DROP = "drop"  # the model is forgotten
    KEEP = "keep"  # nobody is told: its readers say themselves that they are


TRANSITIONS: dict[tuple[State, Event], tuple[State, Action]] = {
    (State.ABSENT, Event.OPEN): (State.PUBLISHING, Action.GRANT),
    (State.PUBLISHING, Event.OPEN): (State.PUBLISHING, Action.WAIT),
    (State.COMMITTED, Event.OPEN): (State.COMMITTED, Action.ATTACH),
    (State.PUBLISHING, Event.COMMIT): (State.COMMITTED, Action.ADMIT),
    (State.PUBLISHING, Event.GIVE_UP): (State.PUBLISHING, Action.PASS_ON),
    (State.COMMITTED, Event.REMOVE): (State.ABSENT, Action.DROP),
    (State.COMMITTED, Event.QUARANTINE): (State.ABSENT, Action.DROP),
    (State.ABSENT, Event.RETURN): (State.COMMITTED, Action.KEEP),
}
"""Pairs that are not in it are refused."""


@dataclass(frozen=True)
class Asker:
    """A client that asked for a model: ``publish`` tells whether it would load it itself."""

    client: int
    publish: bool


@dataclass(frozen=True)
class Granted:
    """``client`` publishes ``key``."""

    key: str
    client: int


@dataclass(frozen=True)
class Attach:
    """``client`` reads ``key`` from now on."""

    key: str
    client: int


@dataclass(frozen=True)
class Refused:
    """``client`` will not get ``key``."""

    key: str
    client: int
    error: WoolyError


@dataclass(frozen=True)
class Dropped:
    """Nothing that was written or held for ``key`` is needed any more."""

    key: str


Effect = Granted | Attach | Refused | Dropped


@dataclass
class Model:
    """One model's state."""

    key: str
    name: str
    engine: str
    device: str
    state: State = State.ABSENT
    publisher: int | None = None
    waiters: deque[Asker] = field(default_factory=deque)
    readers: set[int] = field(default_factory=set)


class Models:
    """All models of a store."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}

    def all(self) -> list[Model]:
        """Every model that is being published or committed, in the order of their first mention."""
        return list(self._models.values())

    def get(self, key: str) -> Model | None:
        """The model with exactly this key."""
        return self._models.get(key)

    def find(self, prefix: str) -> Model:
        """The one model whose key begins so.

        Raises:
            ModelNotFoundError: there is none, or more than one.
        """
        found = [model for key, model in self._models.items() if prefix and key.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ModelNotFoundError(f"no model with key {prefix}; `wooly models` lists them")
        raise ModelNotFoundError(f"{len(found)} models have keys that begin with {prefix}; give more of it")

    def open(self, key: str, asker: Asker, *, name: str, engine: str, device: str) -> list[Effect]:
        """A client asks for a model."""
        model = self._models.get(key) or Model(key, name, engine, device)
        involved = {model.publisher, *model.readers, *(waiter.client for waiter in model.waiters)}
        if asker.client in involved:
            raise ProtocolError(f"client {asker.client} has asked for model {key} before")
        if model.state is State.ABSENT and not asker.publish:
            raise ModelNotFoundError(
                f"{name or key} is not in the store, and this client only attaches; start one that publishes it first"
            )
        action = self._step(model, Event.OPEN)
        self._models[key] = model
        if action is Action.WAIT:
            model.waiters.append(asker)
            return []
        if action is Action.ATTACH:
            model.readers.add(asker.client)
            return [Attach(key, asker.client)]
        model.publisher = asker.client
        return [Granted(key, asker.client)]

    def publishing(self, key: str, client: int) -> Model:
        """The model that this client publishes.

        Raises:
            NotPublisherError: it does not.
        """
        model = self._models.get(key)
        if model is None or model.publisher != client:
            raise NotPublisherError(f"client {client} was not granted the publication of {key}")
        return model

    def commit(self, key: str, client: int) -> list[Effect]:
        """The publisher's bytes are complete and checked."""
        model = self.publishing(key, client)
        self._step(model, Event.COMMIT)
        readers = [client, *(waiter.client for waiter in model.waiters)]
        model.publisher = None
        model.waiters.clear()
        model.readers.update(readers)
        return [Attach(key, reader) for reader in readers]

    def give_up(self, key: str, client: int) -> list[Effect]:
        """The publisher abandons the model."""
        model = self.publishing(key, client)
        self._step(model, Event.GIVE_UP)
        effects: list[Effect] = [Dropped(key)]
        heir = next((waiter for waiter in model.waiters if waiter.publish), None)
        if heir is not None:
            model.waiters.remove(heir)
            model.publisher = heir.client
            return [*effects, Granted(key, heir.client)]
        del self._models[key]
        error = ModelNotFoundError(f"{model.name or key}: its publisher gave up, and nobody else publishes it")
        return [*effects, *(Refused(key, waiter.client, error) for waiter in model.waiters)]

    def leave(self, key: str, client: int) -> list[Effect]:
        """A reader or waiter wants the model no more; a publisher gives up."""
        model = self._models.get(key)
        if model is None:
            return []
        if model.publisher == client:
            return self.give_up(key, client)
        model.readers.discard(client)
        model.waiters = deque(waiter for waiter in model.waiters if waiter.client != client)
        return []

    def lost(self, client: int) -> list[Effect]:
        """A connection is gone, and with it all that the client had or waited for."""
        return [effect for key in list(self._models) for effect in self.leave(key, client)]

    def remove(self, prefix: str) -> tuple[str, list[Effect]]:
        """Drop a model that nobody uses.

        Raises:
            ModelInUseError: somebody reads or publishes it.
        """
        model = self.find(prefix)
        if model.state is not State.COMMITTED or model.readers:
            raise ModelInUseError(
                f"{model.name or model.key} has {len(model.readers)} readers and is {model.state.value}; "
                "stop them first (`wooly status` lists them)"
            )
        self._step(model, Event.REMOVE)
        del self._models[model.key]
        return model.key, [Dropped(model.key)]

    def quarantine(self, key: str) -> list[Effect]:
        """Forget a committed model, whoever reads it."""
        self._step(self._models[key], Event.QUARANTINE)
        del self._models[key]
        return [Dropped(key)]

    def returned(self, key: str, *, name: str, engine: str, device: str) -> None:
        """A model of a store before this one is here again, without readers."""
        model = self._models.get(key) or Model(key, name, engine, device)
        self._step(model, Event.RETURN)
        self._models[key] = model

    @staticmethod
    def _step(model: Model, event: Event) -> Action:
        model.state, action = TRANSITIONS[model.state, event]
        return action
