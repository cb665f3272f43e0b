"""A plain model of a store, and what clients do to both: publish, attach, leave, die.

Clients do one thing at a time each, as the server has it; opens that wait for a publisher stay under way over many
steps, and several publishers' allocations or commits run at once. Memory is limited, and calls of the backend fail as
planned. `property/test_store_machine.py` adds what becomes of models that nobody reads, and says what must hold.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.content import blob, content, key, manifest_of
from support.hostmemory import peek, poke
from support.waiting import open_segments

from shared_store.base.digest import digest
from shared_store.base.errors import (
    DigestMismatchError,
    MemoryBackendError,
    ModelInUseError,
    ModelNotFoundError,
    NotPublisherError,
    OutOfMemoryError,
    ProtocolError,
    WoolyError,
)
from shared_store.base.layout import pack
from shared_store.base.manifest import encode
from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.memory.fake import FakeBackend, Faults
from shared_store.protocol import messages, wire
from shared_store.store.state import segments as segments_module
from shared_store.store.state.records import Client
from shared_store.store.store import Store

MIB = 1 << 20
DEVICE = "fake"
SIZES = (0, 1, 700, 300_000, 800_000, MIB, 2 * MIB + 1, 3 * MIB)
CONTENTS = tuple(content(seed, nbytes) for seed, nbytes in enumerate(SIZES))
BLOBS = tuple(blob(data) for data in CONTENTS)
DATA = dict(zip((one.digest for one in BLOBS), CONTENTS, strict=True))
KEYS = tuple(key(number) for number in range(1, 6))
MODELS = st.lists(st.integers(0, len(SIZES) - 1), max_size=5)
CAPACITY = 8 * MIB
INDEX = st.integers(0, 7)


@dataclass
class Writing:
    """A plan, as its publisher sees it. `counted_on`: digests that were here before.

    `mappings` and `promised` (ids of segments) are by the index of the segment in `planned`.
    """

    model: tuple[int, ...]
    planned: messages.Planned
    mappings: dict[int, Mapping]
    promised: dict[int, int]
    counted_on: set[bytes]
    right: bool = False


@dataclass
class Expected:
    """What the store should know of a key. `publisher`, `readers`, `waiters` are clients' numbers.

    `used`: number of the step in which a reader came or left last.
    """

    publisher: int | None = None
    waiters: deque[tuple[int, bool]] = field(default_factory=deque)
    readers: set[int] = field(default_factory=set)
    committed: tuple[int, ...] | None = None
    pinned: bool = False
    used: int = 0

    @property
    def involved(self):
        return {self.publisher, *self.readers, *(number for number, _ in self.waiters)} - {None}


class StoreMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self):
        super().__init__()
        # Segments of a few MiB, so that models of a few blobs have several.
        segments_module.pack = functools.partial(pack, target=4 * MIB)
        self.before = open_segments()
        self.loop = asyncio.new_event_loop()
        self.backend = FakeBackend(DEVICE, capacity=CAPACITY)
        self.clients_backend = MemfdBackend()
        self.now = 1_000_000.0
        self.store = Store({DEVICE: self.backend}, {}, clock=lambda: self.now)
        self.store.event = self.event
        self.expected = {}
        self.clients = {}
        self.opening = {}  # client number: (key, its open under way)
        self.writing = {}  # key: Writing
        self.requests = 0
        self.number = 0
        self.uses = 0
        self.mapped = {}  # (client number, key): ids of the segments that it was given

    def event(self, kind, **fields):
        """What the store tells, at the moment when it happens: only what nobody reads nor wants to keep is evicted."""
        if kind == "evicted":
            model = self.expected.pop(fields["key"])
            assert model.committed is not None
            assert not model.readers
            assert not model.pinned

    def teardown(self):
        """Nothing is left when all are gone."""
        try:
            self._end()
        finally:
            segments_module.pack = pack
            for task in [task for _, task in self.opening.values()]:
                task.cancel()
            self._turn()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            self.store.segments.close()
        assert open_segments() == self.before

    def _end(self):
        self.backend.faults = Faults()
        for number in list(self.clients):
            self._lose(number)
        for name in [name for name, model in self.expected.items() if model.committed is not None]:
            self.store.remove(name)
        assert self.opening == {}
        assert self.store.models.all() == []
        assert self.backend.allocated_bytes == self.store.segments.resident_bytes(DEVICE) == 0
        assert self.store.segments._blobs == self.store.segments._segments == {}
        assert self.store._plans == self.store._waiting == self.store.committed == {}

    # What may happen.

    @initialize()
    def two_clients(self):
        self.join()
        self.join()

    @precondition(lambda self: len(self.clients) < 5)
    @rule()
    def join(self):
        self.number += 1
        client = Client(self.number, os.getpid(), os.getuid(), "", asyncio.Event(), lambda *_: None)
        self.clients[self.number] = client
        self.store.join(client)

    @precondition(lambda self: self._idle())
    @rule(which=INDEX, name=st.sampled_from(KEYS), publish=st.sampled_from([True, True, False]))
    def open(self, which, name, publish):
        number = self._pick(self._idle(), which)
        model = self.expected.get(name, Expected())
        request = messages.Open(self._request(), name, "", "", DEVICE, publish)
        task = self.loop.create_task(self.store.open(self.clients[number], request))
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
        assert task.result() is None
        model.publisher = number
        self.expected[name] = model

    @precondition(lambda self: self._idle())
    @rule(
        which=INDEX, name=st.sampled_from(KEYS), model=MODELS, upto=st.sampled_from(["plan", "fill", "write", "commit"])
    )
    def publish(self, which, name, model, upto):
        """The steps below in a row, as far as nothing fails: chance alone would seldom put them so."""
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
        client = self.clients[self.expected[name].publisher]
        models = set(self.expected)
        request = messages.Plan(self._request(), name, tuple(BLOBS[index] for index in model))
        (outcome,) = self._together([self.store.plan(client, request)])
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, OutOfMemoryError | MemoryBackendError), repr(outcome)
            assert isinstance(outcome, MemoryBackendError) or set(self.expected) == models  # nothing was lost in vain
            return
        planned, fds = outcome
        promised = {index: segment.id for index, segment in enumerate(planned.segments) if segment.promised}
        there = [index for index in range(len(planned.segments)) if index not in promised]
        mappings = {
            index: Mapping(self.clients_backend, self.clients_backend.import_fd(fd, planned.segments[index].nbytes))
            for index, fd in zip(there, fds, strict=True)
        }
        wire.close_fds(fds)
        digests = [BLOBS[index].digest for index in model]
        new = {digest for digest, place in zip(digests, planned.places, strict=True) if place.new}
        assert new == set(digests) - before
        assert sum(place.new for place in planned.places) == len(new)
        assert {place.segment for place in planned.places if place.new} == set(promised)
        self.writing[name] = Writing(tuple(model), planned, mappings, promised, set(digests) & before)

    @precondition(lambda self: self._promised())
    @rule(chosen=st.lists(INDEX, min_size=1, max_size=3))
    def fill(self, chosen):
        """Up to three publishers get a segment's memory at once."""
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
            nbytes = writing.planned.segments[index].nbytes
            writing.mappings[index] = Mapping(self.clients_backend, self.clients_backend.import_fd(outcome, nbytes))
            os.close(outcome)

    @precondition(lambda self: self._promised())
    @rule(which=INDEX)
    def abandon_while_memory_is_allocated(self, which):
        """What comes too late is freed."""
        name = self._pick(self._promised(), which)
        may_go_on, create = threading.Event(), self.backend.create
        self.backend.create = lambda nbytes: may_go_on.wait() and create(nbytes)
        task = self.loop.create_task(self._fill(name, next(iter(self.writing[name].promised))))
        self._turn()
        self.store.abandon(self.clients[self.expected[name].publisher], name, "")
        may_go_on.set()
        self.loop.run_until_complete(asyncio.wait([task]))
        del self.backend.create
        assert isinstance(task.exception(), NotPublisherError | OutOfMemoryError | MemoryBackendError)
        self._gave_up(name)

    @precondition(lambda self: self._promised())
    @rule(which=INDEX)
    def commit_before_all_is_filled(self, which):
        (outcome,) = self._together([self._commit(self._pick(self._promised(), which))])
        assert isinstance(outcome, ProtocolError)

    @precondition(lambda self: self._filled())
    @rule(which=INDEX, lie=st.booleans())
    def write(self, which, lie):
        """All that is new; or with one bit turned in the last new blob that has any."""
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
            elif name not in self.store.committed:
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
        self.store.abandon(self.clients[self.expected[name].publisher], name, "")
        self._gave_up(name)

    @precondition(lambda self: self._idle())
    @rule(which=INDEX, name=st.sampled_from(KEYS))
    def leave(self, which, name):
        """A reader, a publisher, or one that has nothing to do with the model."""
        number = self._pick(self._idle(), which)
        self.store.leave(self.clients[number], name)
        self._left(number, name)

    @precondition(lambda self: self.clients)
    @rule(which=INDEX)
    def lose(self, which):
        self._lose(self._pick(sorted(self.clients), which))

    @rule(name=st.sampled_from(KEYS))
    def remove(self, name):
        model = self.expected.get(name)
        try:
            assert self.store.remove(name) == name
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
        client = self.clients[self._pick(strangers, which)]
        for call in (
            lambda: self.loop.run_until_complete(self.store.plan(client, messages.Plan(1, name, ()))),
            lambda: self.loop.run_until_complete(self.store.fill(client, messages.Fill(1, name, 1))),
            lambda: self.loop.run_until_complete(self.store.commit(client, messages.Commit(1, name, b""))),
            lambda: self.store.abandon(client, name, ""),
        ):
            with pytest.raises(NotPublisherError):
                call()

    # Inside.

    def _lose(self, number):
        client = self.clients.pop(number)
        client.gone.set()
        if number in self.opening:
            name, task = self.opening.pop(number)
            self.loop.run_until_complete(asyncio.wait([task]))
            assert isinstance(task.exception(), WoolyError)
        self.store.lost(client)
        read = [name for name, model in self.expected.items() if number in model.readers]
        for name in list(self.expected):
            self._left(number, name)
        self._used(*read)

    def _left(self, number, name):
        model = self.expected.get(name)
        if model is None:
            return
        if number in model.readers:
            model.readers.discard(number)
            self._used(name)
        model.waiters = deque(waiter for waiter in model.waiters if waiter[0] != number)
        if model.publisher == number:
            self._gave_up(name)

    def _used(self, *names):
        """Readers came or left, all in one step."""
        self.uses += 1
        for name in names:
            self.expected[name].used = self.uses

    def _gave_up(self, name):
        """The next that may publish does; else the model is gone, and who waits for it is told."""
        self._forget_plan(name)
        self._turn()
        model = self.expected[name]
        heir = next((waiter for waiter in model.waiters if waiter[1]), None)
        if heir is not None:
            model.waiters.remove(heir)
            model.publisher = heir[0]
            assert self.opening.pop(heir[0])[1].result() is None
            return
        del self.expected[name]
        for number, _ in model.waiters:
            assert isinstance(self.opening.pop(number)[1].exception(), ModelNotFoundError)

    def _forget_plan(self, name):
        writing = self.writing.pop(name, None)
        for mapping in writing.mappings.values() if writing else ():
            mapping.close()

    def _admitted(self, number, name, task):
        """An open that was to attach: it did, or the backend failed and the client is no reader."""
        assert task.done()
        self._used(name)
        if task.exception() is not None:
            assert isinstance(task.exception(), MemoryBackendError)
            return
        self.expected[name].readers.add(number)
        self._check_bytes(number, name, task.result())

    def _check_bytes(self, number, name, attachment):
        """What a reader gets are the bytes that the manifest names."""
        self.mapped[number, name] = {segment.id for segment in attachment.segments}
        mappings = []
        for fd, segment in zip(attachment.fds, attachment.segments, strict=True):
            mappings.append(Mapping(self.clients_backend, self.clients_backend.import_fd(fd, segment.nbytes)))
            mappings[-1].map(Access.READ)
        wire.close_fds(attachment.fds)
        for index, place in zip(self.expected[name].committed, attachment.places, strict=True):
            found = peek(mappings[place.segment].address + place.offset, SIZES[index])
            assert digest(found) == BLOBS[index].digest
        for mapping in mappings:
            mapping.close()

    def _commit(self, name, model=None):
        blobs = [BLOBS[index] for index in (self.writing[name].model if model is None else model)]
        manifest = encode(manifest_of(name, blobs, device=DEVICE))
        client = self.clients[self.expected[name].publisher]
        return self.store.commit(client, messages.Commit(self._request(), name, manifest))

    def _fill(self, name, index):
        client = self.clients[self.expected[name].publisher]
        return self.store.fill(client, messages.Fill(self._request(), name, self.writing[name].promised[index]))

    def _sealed(self, writing):
        """Whether a commit that failed got as far as sealing."""
        for mapping in writing.mappings.values():
            try:
                mapping.map(Access.WRITE)
            except MemoryBackendError:
                return True
            finally:
                mapping.unmap()
        return False

    def _together(self, calls):
        async def gather():
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = self.loop.run_until_complete(gather())
        self._turn()
        return outcomes

    def _turn(self):
        """Let everything run that can run without anything new happening."""

        async def turns():
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def _blobs(self):
        return {digest: held for (_, digest), held in self.store.segments._blobs.items()}

    def _idle(self):
        return [number for number in sorted(self.clients) if number not in self.opening]

    def _publishing(self, *, planned=None):
        """Keys that have an idle publisher, with or without a plan."""
        return [
            name
            for name, model in self.expected.items()
            if model.publisher is not None
            and model.publisher not in self.opening
            and (planned is None or planned is (name in self.writing))
        ]

    def _promised(self):
        """Keys whose plans have segments to be allocated."""
        return [name for name in self._publishing(planned=True) if self.writing[name].promised]

    def _filled(self):
        """Keys whose plans have all their segments."""
        return [name for name in self._publishing(planned=True) if not self.writing[name].promised]

    def _request(self):
        self.requests += 1
        return self.requests

    @staticmethod
    def _pick(options, which):
        return options[which % len(options)]
