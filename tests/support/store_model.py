"""A plain model of a store: the expected state, the store's handlers, and the steps that tests of both share."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from support.content import blob, content, key, manifest_of
from support.hostmemory import peek
from support.waiting import open_segments

from shared_store.base.digest import digest
from shared_store.base.errors import MemoryBackendError, ModelNotFoundError, WoolyError
from shared_store.base.layout import pack
from shared_store.base.manifest import encode
from shared_store.memory import Access, Mapping, MemfdBackend
from shared_store.memory.fake import FakeBackend, Faults
from shared_store.protocol import messages
from shared_store.store.assembly import Parts
from shared_store.store.state import publish_plan as plan_module

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
    """A plan, as its publisher sees it. `counted_on`: digests that were committed before.

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
    """Expected state of a key. `publisher`, `readers` and `waiters` are client numbers.

    `used`: number of the step in which a reader attached or left last.
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


class ModelledStore(RuleBasedStateMachine):
    """A store's parts without sockets, and the expected state. Subclasses add rules."""

    def __init__(self):
        super().__init__()
        # Segments of a few MiB, so that models of a few blobs have several.
        plan_module.pack = functools.partial(pack, target=4 * MIB)
        self.before = open_segments()
        self.loop = asyncio.new_event_loop()
        self.backend = FakeBackend(DEVICE, capacity=CAPACITY)
        self.clients_backend = MemfdBackend()
        self.now = 1_000_000.0
        self.parts = Parts({DEVICE: self.backend}, {}, clock=lambda: self.now)
        self.parts.signals.observe(on_event=self.event)
        self.state = self.parts.state
        self.handlers = self.parts.requests
        self.expected = {}
        self.clients = {}  # sessions by client number
        self.opening = {}  # client number: (key, task of its open)
        self.writing = {}  # key: Writing
        self.requests = 0
        self.number = 0
        self.uses = 0
        self.mapped = {}  # (client number, key): ids of the segments in its attachment

    def event(self, kind, **fields):
        """Check each event when it is signalled: only models without readers and pins are evicted."""
        if kind == "evicted":
            model = self.expected.pop(fields["key"])
            assert model.committed is not None
            assert not model.readers
            assert not model.pinned

    def teardown(self):
        """Nothing is left after the last client disconnected and all models were removed."""
        try:
            self._end()
        finally:
            plan_module.pack = pack
            for task in [task for _, task in self.opening.values()]:
                task.cancel()
            self._turn()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            self.parts.devices.close()
        assert open_segments() == self.before

    def _end(self):
        self.backend.faults = Faults()
        for number in list(self.clients):
            self._lose(number)
        for name in [name for name, model in self.expected.items() if model.committed is not None]:
            self._run(self.handlers.administration.remove(None, messages.Remove(self._request(), name)))
        assert self.opening == {}
        assert self.state.models.all() == []
        assert self.backend.allocated_bytes == self.state.segments.resident_bytes(DEVICE) == 0
        assert self.state.segments.blobs.all() == self.state.segments.blobs.references() == {}
        assert self.state.segments.all() == self.parts.waiters.all() == self.state.compactions.all() == []
        assert self.state.plans == self.state.committed == {}

    def _lose(self, number):
        session = self.clients.pop(number)
        session.gone.set()
        if number in self.opening:
            name, task = self.opening.pop(number)
            self.loop.run_until_complete(asyncio.wait([task]))
            assert isinstance(task.exception(), WoolyError)
        self.parts.sessions.end(session)
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
            self._aborted(name)

    def _used(self, *names):
        """Record that readers attached or left, all in one step."""
        self.uses += 1
        for name in names:
            self.expected[name].used = self.uses

    def _aborted(self, name):
        """The next waiter that may publish does; without one, all waiters are refused."""
        self._forget_plan(name)
        self._turn()
        model = self.expected[name]
        successor = next((waiter for waiter in model.waiters if waiter[1]), None)
        if successor is not None:
            model.waiters.remove(successor)
            model.publisher = successor[0]
            assert isinstance(self.opening.pop(successor[0])[1].result().reply, messages.Granted)
            return
        del self.expected[name]
        for number, _ in model.waiters:
            assert isinstance(self.opening.pop(number)[1].exception(), ModelNotFoundError)

    def _forget_plan(self, name):
        writing = self.writing.pop(name, None)
        for mapping in writing.mappings.values() if writing else ():
            mapping.close()

    def _admitted(self, number, name, task):
        """An open that must attach did, or the backend failed and the client is no reader."""
        assert task.done()
        self._used(name)
        if task.exception() is not None:
            assert isinstance(task.exception(), MemoryBackendError)
            return
        self.expected[name].readers.add(number)
        self._check_bytes(number, name, task.result())

    def _check_bytes(self, number, name, answer):
        """A reader maps exactly the bytes that the manifest names."""
        attached = answer.reply
        self.mapped[number, name] = {segment.id for segment in attached.segments}
        mappings = self._import(answer.fds, attached.segments)
        for mapping in mappings:
            mapping.map(Access.READ)
        for index, place in zip(self.expected[name].committed, attached.places, strict=True):
            found = peek(mappings[place.segment].address + place.offset, SIZES[index])
            assert digest(found) == BLOBS[index].digest
        for mapping in mappings:
            mapping.close()

    def _import(self, fds, segments):
        """Mappings of segments, by descriptors that are closed here."""
        with fds:
            return [
                Mapping(self.clients_backend, self.clients_backend.import_fd(fd, segment.nbytes))
                for fd, segment in zip(fds.filenos(), segments, strict=True)
            ]

    def _commit(self, name, model=None):
        blobs = [BLOBS[index] for index in (self.writing[name].model if model is None else model)]
        manifest = encode(manifest_of(name, blobs, device=DEVICE))
        session = self.clients[self.expected[name].publisher]
        return self.handlers.publishing.commit(session, messages.Commit(self._request(), name, manifest))

    def _fill(self, name, index):
        session = self.clients[self.expected[name].publisher]
        return self.handlers.publishing.fill(
            session, messages.Fill(self._request(), name, self.writing[name].promised[index])
        )

    def _sealed(self, writing):
        """Whether a failed commit sealed the segments."""
        for mapping in writing.mappings.values():
            try:
                mapping.map(Access.WRITE)
            except MemoryBackendError:
                return True
            finally:
                mapping.unmap()
        return False

    def _run(self, handler):
        """Run one handler to its end; its reply."""
        return self.loop.run_until_complete(handler).reply

    def _together(self, calls):
        async def gather():
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = self.loop.run_until_complete(gather())
        self._turn()
        return outcomes

    def _turn(self):
        """Run the event loop until no task can continue by itself."""

        async def turns():
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def _blobs(self):
        return {digest: entry for (_, digest), entry in self.state.segments.blobs.all().items()}

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
