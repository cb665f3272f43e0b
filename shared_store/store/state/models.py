"""Publishers, waiters and readers of models: a transition table, and nothing but state.

A model is absent, being published, or committed. A committed model whose bytes are not all on its device is published
again by the next client that opens it: it is *returning* until then, and stays in the store if that fails. When its
bytes turn out wrong it is withdrawn: its key is free again, and the model exists under a token until its last reader
has left. :data:`TRANSITIONS` lists every transition; :class:`Models` applies it and returns the effects.

A reader is awake, or *away*: it sleeps, maps nothing, and needs the model's bytes in any tier (see
:mod:`shared_store.store.state.residency`).
"""

from __future__ import annotations

import enum
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, NotPublisherError, ProtocolError
from shared_store.store.state.effects import MayPublish, MayRead, Refused
from shared_store.store.state.owners import OwnerIndex


class State(enum.Enum):
    """Lifecycle state."""

    ABSENT = "absent"
    PUBLISHING = "publishing"
    COMMITTED = "committed"
    RETURNING = "returning"  # committed, and a client publishes it again because it is not on its device
    WITHDRAWN = "withdrawn"  # has no key any more, so no client can open it


class Event(enum.Enum):
    """Events in the life of a model."""

    OPEN = "open"
    OPEN_ELSEWHERE = "open elsewhere"  # opened while its bytes are not all on its device
    COMMIT = "commit"
    ABORT = "abort"  # the publisher abandons the publication or disconnects
    UNCLAIMED = "unclaimed"  # no waiter publishes in place of a publisher that aborted
    REMOVE = "remove"  # by a command, or evicted
    QUARANTINE = "quarantine"  # a segment with its blobs has wrong bytes
    LAST_LEFT = "last left"  # no reader is left
    RETURN = "return"  # an earlier store had it committed, and its segments are in this store


class Action(enum.Enum):
    """Work that a transition requires."""

    GRANT = "grant"  # the client that asked publishes
    WAIT = "wait"  # the client that asked waits for the publisher
    ATTACH = "attach"  # the client that asked reads
    ADMIT = "admit"  # the publisher and all waiters read
    PASS_ON = "pass on"  # noqa: S105 - no password; drop the written segments; the next waiter that may publish does
    DROP = "drop"  # forget the model
    KEEP = "keep"  # answer no client: earlier readers rejoin by themselves
    WITHDRAW = "withdraw"  # forget the key; retain the segments that readers map


TRANSITIONS: dict[tuple[State, Event], tuple[State, Action]] = {
    (State.ABSENT, Event.OPEN): (State.PUBLISHING, Action.GRANT),
    (State.PUBLISHING, Event.OPEN): (State.PUBLISHING, Action.WAIT),
    (State.COMMITTED, Event.OPEN): (State.COMMITTED, Action.ATTACH),
    (State.PUBLISHING, Event.COMMIT): (State.COMMITTED, Action.ADMIT),
    (State.PUBLISHING, Event.ABORT): (State.PUBLISHING, Action.PASS_ON),
    (State.COMMITTED, Event.REMOVE): (State.ABSENT, Action.DROP),
    (State.COMMITTED, Event.QUARANTINE): (State.WITHDRAWN, Action.WITHDRAW),
    (State.WITHDRAWN, Event.LAST_LEFT): (State.ABSENT, Action.DROP),
    (State.ABSENT, Event.RETURN): (State.COMMITTED, Action.KEEP),
    (State.COMMITTED, Event.OPEN_ELSEWHERE): (State.RETURNING, Action.GRANT),
    (State.RETURNING, Event.OPEN): (State.RETURNING, Action.WAIT),
    (State.RETURNING, Event.COMMIT): (State.COMMITTED, Action.ADMIT),
    (State.RETURNING, Event.ABORT): (State.RETURNING, Action.PASS_ON),
    (State.RETURNING, Event.UNCLAIMED): (State.COMMITTED, Action.KEEP),
    (State.RETURNING, Event.QUARANTINE): (State.WITHDRAWN, Action.WITHDRAW),
}
"""Pairs that are not listed are refused."""


@dataclass(frozen=True)
class Asker:
    """A client that asked for a model. ``publish``: it would load the model itself."""

    client: int
    publish: bool


@dataclass(frozen=True)
class Dropped:
    """The owner ``key`` (a model's key, or the token of a withdrawn model) needs nothing any more."""

    key: str


@dataclass(frozen=True)
class Withdrawn:
    """References of ``key`` become references of ``token``."""

    key: str
    token: str


@dataclass(frozen=True)
class Unplanned:
    """The plan to publish ``key`` is void, and the model stays as it is."""

    key: str


Outcome = MayPublish | MayRead | Refused | Dropped | Withdrawn | Unplanned


@dataclass
class Model:
    """One model's state.

    ``readers`` includes those that are ``away``. ``last_used``: Unix seconds at which a reader attached or left last.
    """

    key: str
    name: str
    engine: str
    device: str
    state: State = State.ABSENT
    publisher: int | None = None
    waiters: deque[Asker] = field(default_factory=deque)
    readers: set[int] = field(default_factory=set)
    away: set[int] = field(default_factory=set)
    pinned: bool = False
    last_used: float = 0.0

    @property
    def awake(self) -> set[int]:
        """The readers that map it."""
        return self.readers - self.away

    def involves(self, client: int) -> bool:
        """Whether a client publishes the model, reads it awake, or waits for it."""
        return (
            client == self.publisher or client in self.awake or any(waiter.client == client for waiter in self.waiters)
        )


class Models:
    """The models of a store."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` returns Unix seconds. Setting it back does not change the order of last uses."""
        self._models: dict[str, Model] = {}
        self._withdrawn: dict[str, Model] = {}
        self._by_client = OwnerIndex[int, str]()  # keys of the models that a client publishes, reads or waits for
        self._tokens = itertools.count(1)
        self._clock = clock
        self._latest = 0.0

    def all(self) -> list[Model]:
        """Return every model that is being published or committed, in the order of their first opens."""
        return list(self._models.values())

    def of(self, client: int) -> list[Model]:
        """Return the models, withdrawn ones excepted, that a client publishes, reads or waits for."""
        found = (self._models.get(key) for key in sorted(self._by_client.of(client)))
        return [model for model in found if model is not None and model.involves(client)]

    def involved(self) -> dict[int, frozenset[str]]:
        """Return the index of keys by client, withdrawn models included, for tests."""
        return self._by_client.all()

    def withdrawn(self) -> dict[str, Model]:
        """Return the withdrawn models, which have readers, by their tokens."""
        return dict(self._withdrawn)

    def get(self, key: str) -> Model | None:
        """Return the model with exactly this key."""
        return self._models.get(key)

    def find(self, prefix: str) -> Model:
        """Return the only model whose key has this prefix.

        Raises:
            ModelNotFoundError: no model has it, or more than one.
        """
        if prefix in self._models:  # a whole key; keys have equal lengths
            return self._models[prefix]
        found = [model for key, model in self._models.items() if prefix and key.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ModelNotFoundError(f"no model with key {prefix}; `wooly models` lists them")
        raise ModelNotFoundError(f"{len(found)} models have keys that begin with {prefix}; use a longer prefix")

    def open(
        self, key: str, asker: Asker, *, name: str, engine: str, device: str, resident: bool = True
    ) -> list[Outcome]:
        """Open a model for a client: read it, publish it, or wait for its publisher. A reader that is away wakes.

        ``resident``: all bytes of the model, if it is committed, are on its device.
        """
        model = self._models.get(key) or Model(key, name, engine, device)
        if model.involves(asker.client):
            raise ProtocolError(f"client {asker.client} has asked for model {key} before")
        if model.state is State.ABSENT and not asker.publish:
            raise ModelNotFoundError(
                f"{name or key} is not in the store, and this client only attaches; start one that publishes it first"
            )
        elsewhere = model.state is State.COMMITTED and not resident
        if elsewhere and not asker.publish:
            raise ModelNotFoundError(
                f"{name or key} is in host memory only, and this client only attaches; wake a reader, or start one "
                "that publishes"
            )
        action = self._step(model, Event.OPEN_ELSEWHERE if elsewhere else Event.OPEN)
        self._models[key] = model
        self._by_client.add(asker.client, key)
        if action is Action.WAIT:
            model.waiters.append(asker)
            return []
        if action is Action.ATTACH:
            model.readers.add(asker.client)
            model.away.discard(asker.client)
            self._use(model)
            return [MayRead(key, asker.client)]
        model.publisher = asker.client
        return [MayPublish(key, asker.client)]

    def publishing(self, key: str, client: int) -> Model:
        """Return the model, which this client must be publishing.

        Raises:
            NotPublisherError: the client does not publish it.
        """
        model = self._models.get(key)
        if model is None or model.publisher != client:
            raise NotPublisherError(f"client {client} was not granted the publication of {key}")
        return model

    def commit(self, key: str, client: int) -> list[Outcome]:
        """Commit a model whose bytes are complete and verified."""
        model = self.publishing(key, client)
        self._step(model, Event.COMMIT)
        readers = [client, *(waiter.client for waiter in model.waiters)]
        model.publisher = None
        model.waiters.clear()
        model.readers.update(readers)
        model.away.difference_update(readers)
        self._use(model)
        return [MayRead(key, reader) for reader in readers]

    def abort(self, key: str, client: int) -> list[Outcome]:
        """End a publication without a commit; the next waiter that may publish does."""
        model = self.publishing(key, client)
        self._step(model, Event.ABORT)
        returning = model.state is State.RETURNING
        model.publisher = None
        self._left(key, client)
        effects: list[Outcome] = [Unplanned(key) if returning else Dropped(key)]
        successor = next((waiter for waiter in model.waiters if waiter.publish), None)
        if successor is not None:
            model.waiters.remove(successor)
            model.publisher = successor.client
            return [*effects, MayPublish(key, successor.client)]
        waiters, model.waiters = model.waiters, deque()
        if returning:
            self._step(model, Event.UNCLAIMED)
        else:
            del self._models[key]
        for waiter in waiters:
            self._left(key, waiter.client)
        error = ModelNotFoundError(f"{model.name or key}: its publisher aborted, and no other client publishes it")
        return [*effects, *(Refused(key, waiter.client, error) for waiter in waiters)]

    def leave(self, key: str, client: int) -> list[Outcome]:
        """Remove a reader or waiter; abort the publication if it was the publisher.

        Also remove the client from the readers of withdrawn models that had this key.
        """
        effects = [
            effect
            for token, model in list(self._withdrawn.items())
            if model.key == key and client in model.readers
            for effect in self._leave_withdrawn(token, client)
        ]
        model = self._models.get(key)
        if model is not None:
            if model.publisher == client:
                effects += self.abort(key, client)
            if client in model.readers:
                model.readers.discard(client)
                model.away.discard(client)
                self._use(model)
            if model.waiters:
                model.waiters = deque(waiter for waiter in model.waiters if waiter.client != client)
        self._left(key, client)
        return effects

    def go_away(self, key: str, client: int) -> None:
        """Record that a reader sleeps. Idempotent.

        Raises:
            ModelNotFoundError: the client does not read the model.
        """
        model = self._models.get(key)
        if model is None or client not in model.readers:
            raise ModelNotFoundError(f"client {client} does not read {key}")
        model.away.add(client)
        self._use(model)

    def lost(self, client: int) -> list[Outcome]:
        """Remove a client from all models, because its connection ended."""
        return [effect for key in sorted(self._by_client.of(client)) for effect in self.leave(key, client)]

    def unread(self, owner: str) -> bool:
        """Whether an owner of references is a committed model without readers."""
        model = self._models.get(owner)
        return model is not None and model.state is State.COMMITTED and not model.readers

    def pin(self, prefix: str, *, pinned: bool) -> str:
        """Pin or unpin a model, committed or being published; return its key."""
        model = self.find(prefix)
        model.pinned = pinned
        return model.key

    def remove(self, prefix: str) -> tuple[str, list[Outcome]]:
        """Remove a committed model without readers; return its key.

        Raises:
            ModelInUseError: it has readers, or is being published.
        """
        model = self.find(prefix)
        if model.state is not State.COMMITTED or model.readers:
            asleep = f" ({len(model.away)} of them asleep)" if model.away else ""
            raise ModelInUseError(
                f"{model.name or model.key} has {len(model.readers)} readers{asleep} and is {model.state.value}; "
                "stop them first (`wooly status` lists them)"
            )
        self._step(model, Event.REMOVE)
        del self._models[model.key]
        return model.key, [Dropped(model.key)]

    def returned(
        self, key: str, *, name: str, engine: str, device: str, pinned: bool = False, last_used: float = 0.0
    ) -> None:
        """Add a model that an earlier store had committed, without readers."""
        model = self._models.get(key) or Model(key, name, engine, device)
        self._step(model, Event.RETURN)
        model.pinned, model.last_used = pinned, last_used
        self._models[key] = model

    def withdraw(self, key: str) -> list[Outcome]:
        """Free the key of a committed model that has wrong bytes; its readers keep their mappings.

        Readers that are away are forgotten: they have copies with right bytes, and publish the model when they wake. A
        client that was publishing it again publishes it anew.
        """
        model = self._models.pop(key)
        if model.state is State.RETURNING:
            anew = Model(key, model.name, model.engine, model.device, State.PUBLISHING, model.publisher, model.waiters)
            model.publisher, model.waiters = None, deque()
            self._models[key] = anew
        self._step(model, Event.QUARANTINE)
        forgotten, model.away = model.away, set()
        model.readers = model.readers - forgotten
        token = f"{key}/withdrawn {next(self._tokens)}"
        self._withdrawn[token] = model
        for client in forgotten:
            self._left(key, client)
        return [Withdrawn(key, token), *self._drop_unread(token)]

    def _leave_withdrawn(self, token: str, client: int) -> list[Outcome]:
        self._withdrawn[token].readers.discard(client)
        return self._drop_unread(token)

    def _drop_unread(self, token: str) -> list[Outcome]:
        model = self._withdrawn[token]
        if model.readers:
            return []
        self._step(model, Event.LAST_LEFT)
        del self._withdrawn[token]
        return [Dropped(token)]

    def _left(self, key: str, client: int) -> None:
        """Update the index after a client left a model with this key; it may read a withdrawn one that had the key."""
        model = self._models.get(key)
        if model is not None and (client in model.readers or model.involves(client)):
            return
        if not any(model.key == key and client in model.readers for model in self._withdrawn.values()):
            self._by_client.discard(client, key)

    def _use(self, model: Model) -> None:
        # A microsecond is the smallest step that a float of Unix seconds can represent in this century.
        self._latest = model.last_used = max(self._clock(), self._latest + 1e-6)

    @staticmethod
    def _step(model: Model, event: Event) -> Action:
        model.state, action = TRANSITIONS[model.state, event]
        return action
