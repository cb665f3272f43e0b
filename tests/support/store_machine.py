"""Rules that drive a store's handlers as clients do: publish, attach, leave, disconnect.

A client has one request at a time, as in the server; opens that wait for a publisher last over many steps, and
several publishers' allocations or commits run at once. Memory is limited, and calls of the backend fail as planned.
`store/test_store_machine.py` adds models without readers, and the invariants.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from support.hostmemory import poke
from support.store_model import BLOBS, CONTENTS, DEVICE, INDEX, KEYS, MODELS, SIZES, Expected, ModelledStore, Writing

from shared_store.base.errors import (
    DigestMismatchError,
    MemoryBackendError,
    ModelInUseError,
    ModelNotFoundError,
    NotPublisherError,
    OutOfMemoryError,
    ProtocolError,
)
from shared_store.memory import Access
from shared_store.protocol import messages
from shared_store.store.session import Session
from shared_store.store.state.clients import Client


class StoreMachine(ModelledStore):
    """See the module."""

    # Rules.

    @initialize()
    def two_clients(self):
        self.join()
        self.join()

    @precondition(lambda self: len(self.clients) < 5)
    @rule()
    def join(self):
        self.number += 1
        client = Client(self.number, os.getpid(), os.getuid(), "")
        self.clients[self.number] = Session(client, asyncio.Event(), lambda *_: None)
        self.parts.sessions.begin(self.clients[self.number])

    @precondition(lambda self: self._idle())
    @rule(which=INDEX, name=st.sampled_from(KEYS), publish=st.sampled_from([True, True, False]))
    def open(self, which, name, publish):
        number = self._pick(self._idle(), which)
        model = self.expected.get(name, Expected())
        request = messages.Open(self._request(), name, "", "", DEVICE, publish)
        task = self.loop.create_task(self.handlers.opening.open(self.clients[number], request))
        self._turn()
        if number in model.involved:
            assert isinstance(task.exception(), ProtocolError)
            return
        if model.publisher is not None:
            model.waiters.append((number, publish))
            self.opening[number] = (name, task)
            return
        if model.committed is not None:
            self._admitted(number, name, task)
            return
        if not publish:
            assert isinstance(task.exception(), ModelNotFoundError)
            return
        assert isinstance(task.result().reply, messages.Granted)
        model.publisher = number
        self.expected[name] = model

    @precondition(lambda self: self._idle())
    @rule(
        which=INDEX, name=st.sampled_from(KEYS), model=MODELS, upto=st.sampled_from(["plan", "fill", "write", "commit"])
    )
    def publish(self, which, name, model, upto):
        """The steps below in a row, until one fails: random steps alone would rarely be in this order."""
        number = self._pick(self._idle(), which)
        if name in self.expected:
            return
        self.open(self._idle().index(number), name, publish=True)
        self._plan(name, model)
        if upto == "plan" or name not in self._publishing(planned=True):
            return
        for _ in self.writing[name].planned.segments:
            if name in self._promised():
                self._fill_one_each([name])
        if upto == "fill" or name not in self._filled():
            return
        self._write(name, lie=False)
        if upto == "commit":
            self._commit_all([name])

    @precondition(lambda self: self._publishing(planned=False))
    @rule(which=INDEX, model=MODELS)
    def plan(self, which, model):
        self._plan(self._pick(self._publishing(planned=False), which), model)

    def _plan(self, name, model):
        before = set(self._blobs())
        session = self.clients[self.expected[name].publisher]
        models = set(self.expected)
        request = messages.Plan(self._request(), name, tuple(BLOBS[index] for index in model))
        (outcome,) = self._together([self.handlers.publishing.plan(session, request)])
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, OutOfMemoryError | MemoryBackendError), repr(outcome)
            assert (
                isinstance(outcome, MemoryBackendError) or set(self.expected) == models
            )  # nothing was evicted without gain
            return
        planned = outcome.reply
        promised = {index: segment.id for index, segment in enumerate(planned.segments) if segment.promised}
        there = [index for index in range(len(planned.segments)) if index not in promised]
        existing = self._import(outcome.fds, [planned.segments[index] for index in there])
        mappings = dict(zip(there, existing, strict=True))
        digests = [BLOBS[index].digest for index in model]
        new = {digest for digest, place in zip(digests, planned.places, strict=True) if place.new}
        assert new == set(digests) - before
        assert sum(place.new for place in planned.places) == len(new)
        assert {place.segment for place in planned.places if place.new} == set(promised)
        self.writing[name] = Writing(tuple(model), planned, mappings, promised, set(digests) & before)

    @precondition(lambda self: self._promised())
    @rule(chosen=st.lists(INDEX, min_size=1, max_size=3))
    def fill(self, chosen):
        """Up to three publishers fill a segment at once."""
        self._fill_one_each(list(dict.fromkeys(self._pick(self._promised(), which) for which in chosen)))

    def _fill_one_each(self, names):
        indexes = [next(iter(self.writing[name].promised)) for name in names]
        outcomes = self._together([self._fill(name, index) for name, index in zip(names, indexes, strict=True)])
        for name, index, outcome in zip(names, indexes, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, OutOfMemoryError | MemoryBackendError), repr(outcome)
                continue
            writing = self.writing[name]
            del writing.promised[index]
            (writing.mappings[index],) = self._import(outcome.fds, [writing.planned.segments[index]])

    @precondition(lambda self: self._promised())
    @rule(which=INDEX)
    def abandon_while_memory_is_allocated(self, which):
        """Memory that is allocated too late is released."""
        name = self._pick(self._promised(), which)
        may_go_on, create = threading.Event(), self.backend.create
        self.backend.create = lambda nbytes: may_go_on.wait() and create(nbytes)
        task = self.loop.create_task(self._fill(name, next(iter(self.writing[name].promised))))
        self._turn()
        self._abandon(name)
        may_go_on.set()
        self.loop.run_until_complete(asyncio.wait([task]))
        del self.backend.create
        assert isinstance(task.exception(), NotPublisherError | OutOfMemoryError | MemoryBackendError)
        self._aborted(name)

    @precondition(lambda self: self._promised())
    @rule(which=INDEX)
    def commit_before_all_is_filled(self, which):
        (outcome,) = self._together([self._commit(self._pick(self._promised(), which))])
        assert isinstance(outcome, ProtocolError)

    @precondition(lambda self: self._filled())
    @rule(which=INDEX, lie=st.booleans())
    def write(self, which, lie):
        """Write all new blobs; for a lie, flip a bit of the last one that is not empty."""
        self._write(self._pick(self._filled(), which), lie=lie)

    def _write(self, name, *, lie):
        writing = self.writing[name]
        new = [(index, place) for index, place in zip(writing.model, writing.planned.places, strict=True) if place.new]
        if self._sealed(writing):
            return
        for index, place in new:
            mapping = writing.mappings[place.segment]
            mapping.map(Access.WRITE)
            poke(mapping.address + place.offset, CONTENTS[index])
        writing.right = True
        liable = [(index, place) for index, place in new if SIZES[index]]
        if lie and liable:
            index, place = liable[-1]
            address = writing.mappings[place.segment].address + place.offset
            poke(address, bytes([CONTENTS[index][0] ^ 1]))
            writing.right = False
        for mapping in writing.mappings.values():
            mapping.unmap()

    @precondition(lambda self: self._filled())
    @rule(chosen=st.lists(INDEX, min_size=1, max_size=3))
    def commit(self, chosen):
        """Up to three publishers commit at once."""
        self._commit_all(list(dict.fromkeys(self._pick(self._filled(), which) for which in chosen)))

    def _commit_all(self, names):
        committed = []
        numbers = [self.expected[name].publisher for name in names]
        for name, number, outcome in zip(names, numbers, self._together(map(self._commit, names)), strict=True):
            model, writing = self.expected[name], self.writing[name]
            must_be_right = any(
                place.new and SIZES[index] for index, place in zip(writing.model, writing.planned.places, strict=True)
            )
            if isinstance(outcome, DigestMismatchError):
                assert must_be_right
                assert not writing.right
                self._forget_plan(name)
            elif name not in self.state.committed:
                assert isinstance(outcome, MemoryBackendError), repr(outcome)
            else:
                assert writing.right or not must_be_right
                self._forget_plan(name)
                committed.append(name)
                model.committed, model.publisher = writing.model, None
                waiters, model.waiters = model.waiters, deque()
                if isinstance(outcome, BaseException):
                    assert isinstance(outcome, MemoryBackendError)
                else:
                    model.readers.add(number)
                    self._check_bytes(number, name, outcome)
                for waiter, _ in waiters:
                    self._admitted(waiter, name, self.opening.pop(waiter)[1])
        self._used(*committed)

    @precondition(lambda self: self._filled())
    @rule(which=INDEX)
    def commit_while_mapped_for_writing(self, which):
        name = self._pick(self._filled(), which)
        writing = self.writing[name]
        written = sorted({place.segment for place in writing.planned.places if place.new})
        if not written or self._sealed(writing):
            return
        writing.mappings[written[-1]].map(Access.WRITE)
        (outcome,) = self._together([self._commit(name)])
        assert isinstance(outcome, MemoryBackendError)
        writing.mappings[written[-1]].unmap()

    @precondition(lambda self: self._filled())
    @rule(which=INDEX, other=MODELS)
    def commit_another_model_than_planned(self, which, other):
        name = self._pick(self._filled(), which)
        if tuple(other) == self.writing[name].model:
            return
        (outcome,) = self._together([self._commit(name, other)])
        assert isinstance(outcome, ProtocolError)

    @precondition(lambda self: self._publishing())
    @rule(which=INDEX)
    def abandon(self, which):
        name = self._pick(self._publishing(), which)
        self._abandon(name)
        self._aborted(name)

    @precondition(lambda self: self._idle())
    @rule(which=INDEX, name=st.sampled_from(KEYS))
    def leave(self, which, name):
        """A reader, a publisher, or a client without a lease on the model."""
        number = self._pick(self._idle(), which)
        self._run(self.handlers.opening.leave(self.clients[number], messages.Leave(self._request(), name)))
        self._left(number, name)

    @precondition(lambda self: self.clients)
    @rule(which=INDEX)
    def lose(self, which):
        self._lose(self._pick(sorted(self.clients), which))

    @rule(name=st.sampled_from(KEYS))
    def remove(self, name):
        model = self.expected.get(name)
        try:
            request = messages.Remove(self._request(), name)
            assert self._run(self.handlers.administration.remove(None, request)).detail == name
        except ModelNotFoundError:
            assert model is None
        except ModelInUseError:
            assert model.readers or model.committed is None
        else:
            assert model.committed is not None
            assert not model.readers
            del self.expected[name]

    @rule(call=st.sampled_from(["create", "export", "import_fd", "seal", "map"]), nth=st.integers(1, 3))
    def fail_at(self, call, nth):
        self.backend.faults.fail_at(call, nth)

    @rule(which=INDEX, name=st.sampled_from(KEYS))
    def strangers_publish_nothing(self, which, name):
        """A client that was not granted a model can neither plan, commit nor abandon it."""
        strangers = [number for number in self._idle() if self.expected.get(name, Expected()).publisher != number]
        if not strangers:
            return
        session, publishing = self.clients[self._pick(strangers, which)], self.handlers.publishing
        for handler, request in (
            (publishing.plan, messages.Plan(1, name, ())),
            (publishing.fill, messages.Fill(1, name, 1)),
            (publishing.commit, messages.Commit(1, name, b"")),
            (publishing.abandon, messages.Abandon(1, name, "")),
        ):
            with pytest.raises(NotPublisherError):
                self._run(handler(session, request))

    def _abandon(self, name):
        session = self.clients[self.expected[name].publisher]
        self._run(self.handlers.publishing.abandon(session, messages.Abandon(self._request(), name, "")))
