"""Who publishes a model, who waits for it, who reads it: a state table, and nothing but state.

A model is absent, being published, or committed. One whose bytes turned out wrong is withdrawn: its key is free again,
and what its readers map is held for them until the last has left. :data:`TRANSITIONS` is the whole of it;
:class:`Models` applies it and returns what has to be done as effects, which the server carries out.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, NotPublisherError, ProtocolError, WoolyError


class State(enum.Enum):
    """Where a model is in its life."""

    ABSENT = "absent"
    PUBLISHING = "publishing"
    COMMITTED = "committed"
    WITHDRAWN = "withdrawn"  # no longer under its key, so nobody can open it


class Event(enum.Enum):
    """What can happen to a model."""

    OPEN = "open"
    COMMIT = "commit"
    GIVE_UP = "give up"  # the publisher abandons, or its connection is lost
    REMOVE = "remove"  # by hand, or to make room
    QUARANTINE = "quarantine"  # bytes that it has are not those of their digests
    LAST_LEFT = "last left"  # no reader is left
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
    WITHDRAW = "withdraw"  # the key is forgotten; what is mapped is held for those who map it


TRANSITIONS: dict[tuple[State, Event], tuple[State, Action]] = {
    (State.ABSENT, Event.OPEN): (State.PUBLISHING, Action.GRANT),
    (State.PUBLISHING, Event.OPEN): (State.PUBLISHING, Action.WAIT),
    (State.COMMITTED, Event.OPEN): (State.COMMITTED, Action.ATTACH),
    (State.PUBLISHING, Event.COMMIT): (State.COMMITTED, Action.ADMIT),
    (State.PUBLISHING, Event.GIVE_UP): (State.PUBLISHING, Action.PASS_ON),
    (State.COMMITTED, Event.REMOVE): (State.ABSENT, Action.DROP),
    (State.COMMITTED, Event.QUARANTINE): (State.WITHDRAWN, Action.WITHDRAW),
    (State.WITHDRAWN, Event.LAST_LEFT): (State.ABSENT, Action.DROP),
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
    """Nothing that was written or held for ``key`` (or a withdrawn model's token) is needed any more."""

    key: str


@dataclass(frozen=True)
class Withdrawn:
    """What was held for ``key`` is held for ``token`` from now on."""

    key: str
    token: str


Effect = Granted | Attach | Refused | Dropped | Withdrawn


@dataclass
class Model:
    """One model's state. ``last_used``: when a reader came or left last, in Unix seconds."""

    key: str
    name: str
    engine: str
    device: str
    state: State = State.ABSENT
    publisher: int | None = None
    waiters: deque[Asker] = field(default_factory=deque)
    readers: set[int] = field(default_factory=set)
    pinned: bool = False
    last_used: float = 0.0


class Models:
    """All models of a store."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` tells Unix seconds; that it may be set back does not disturb the order of last uses."""
        self._models: dict[str, Model] = {}
        self._withdrawn: dict[str, Model] = {}
        self._tokens = itertools.count(1)
        self._clock = clock
        self._latest = 0.0

    def all(self) -> list[Model]:
        """Every model that is being published or committed, in the order of their first mention."""
        return list(self._models.values())

    def withdrawn(self) -> dict[str, Model]:
        """Withdrawn models that have readers, by their tokens."""
        return dict(self._withdrawn)

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
            self._use(model)
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
        self._use(model)
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
        """A reader or waiter wants the model no more; a publisher gives up.

        Whoever read a model under this key that was withdrawn has let go of that as well.
        """
        effects = [
            effect
            for token, model in list(self._withdrawn.items())
            if model.key == key and client in model.readers
            for effect in self._leave_withdrawn(token, client)
        ]
        model = self._models.get(key)
        if model is None:
            return effects
        if model.publisher == client:
            return effects + self.give_up(key, client)
        if client in model.readers:
            model.readers.discard(client)
            self._use(model)
        model.waiters = deque(waiter for waiter in model.waiters if waiter.client != client)
        return effects

    def lost(self, client: int) -> list[Effect]:
        """A connection is gone, and with it all that the client had or waited for."""
        keys = {**self._models, **{model.key: model for model in self._withdrawn.values()}}
        return [effect for key in keys for effect in self.leave(key, client)]

    def pin(self, prefix: str, *, pinned: bool) -> str:
        """Keep a model from being evicted, or no longer; one that is being published, too. Returns its key."""
        model = self.find(prefix)
        model.pinned = pinned
        return model.key

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

    def returned(
        self, key: str, *, name: str, engine: str, device: str, pinned: bool = False, last_used: float = 0.0
    ) -> None:
        """A model of a store before this one is here again, without readers."""
        model = self._models.get(key) or Model(key, name, engine, device)
        self._step(model, Event.RETURN)
        model.pinned, model.last_used = pinned, last_used
        self._models[key] = model

    def withdraw(self, key: str) -> list[Effect]:
        """A committed model has wrong bytes: its key is free, and its readers go on with what they map."""
        model = self._models[key]
        self._step(model, Event.QUARANTINE)
        del self._models[key]
        token = f"{key}/withdrawn {next(self._tokens)}"
        self._withdrawn[token] = model
        return [Withdrawn(key, token), *self._drop_unread(token)]

    def _leave_withdrawn(self, token: str, client: int) -> list[Effect]:
        self._withdrawn[token].readers.discard(client)
        return self._drop_unread(token)

    def _drop_unread(self, token: str) -> list[Effect]:
        model = self._withdrawn[token]
        if model.readers:
            return []
        self._step(model, Event.LAST_LEFT)
        del self._withdrawn[token]
        return [Dropped(token)]

    def _use(self, model: Model) -> None:
        # A step of a microsecond is what a float tells apart in this century.
        self._latest = model.last_used = max(self._clock(), self._latest + 1e-6)

    @staticmethod
    def _step(model: Model, event: Event) -> Action:
        model.state, action = TRANSITIONS[model.state, event]
        return action
