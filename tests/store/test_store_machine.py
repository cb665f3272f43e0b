"""The store's handlers under any sequence of requests and failures, against a plain model of the state.

Adds pins, eviction, compaction by clients and by the store, and quarantine to `support/store_machine.py`. The
invariants are at the end: no referenced blob is lost, nothing leaks, reference counts are exact, and models with
readers or pins are not evicted. `test_store_state.py` drives the state alone.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from support.hostmemory import peek, poke
from support.store_machine import StoreMachine
from support.store_model import BLOBS, CAPACITY, DATA, DEVICE, INDEX, KEYS, MIB, MODELS, SIZES
from support.waiting import open_segments

from shared_store.base.digest import digest
from shared_store.base.errors import DigestMismatchError, MemoryBackendError, ModelNotFoundError, ProtocolError
from shared_store.memory import Access, Mapping
from shared_store.protocol import messages
from shared_store.store.devices.digest_check import mapping_of
from shared_store.store.session import Answer
from shared_store.store.space import admission as admission_module
from shared_store.store.space.eviction import evict
from shared_store.store.state.models import State


@dataclass
class Copying:
    """A compaction, as the copying client sees it. `right`: whether the copies are."""

    task: messages.Compacting
    target: Mapping
    sources: list[Mapping]
    right: bool = False


@dataclass
class Withdrawn:
    """A withdrawn model with readers.

    `mapped`: ids of the segments that each reader maps; `shared`: digests of its blobs that are not quarantined.
    """

    name: str
    readers: set[int]
    mapped: dict[int, set[int]]
    shared: set[bytes] = field(default_factory=set)


SMALL = st.lists(st.integers(0, len(SIZES) - 4), max_size=3)
"""Models that fit into one segment of 2 MiB together, once they are compacted."""


class CacheMachine(StoreMachine):
    """See the module."""

    def __init__(self):
        super().__init__()
        self.copying = {}  # client number: Copying
        self.withdrawn = {}  # token: Withdrawn
        admission_module.evict = self.evict

    def teardown(self):
        """Check that nothing is left."""
        admission_module.evict = evict
        super().teardown()
        assert self.withdrawn == {}
        assert self.copying == {}

    def evict(self, models, segments, needed):
        """Check the snapshot that the policy gets; `test_policy.py` tests its answers."""
        asked = {model.key: (model.readers, model.pinned) for model in models}
        assert asked == {
            name: (len(model.readers), model.pinned)
            for name, model in self.expected.items()
            if model.committed is not None
        }
        assert sum(segment.nbytes for segment in segments) <= self.backend.allocated_bytes
        return evict(models, segments, needed)

    # Random steps alone would rarely fill a store with models without readers.

    @initialize(
        limit=st.sampled_from([6 * MIB, CAPACITY, 10 * MIB]),
        models=st.lists(SMALL | MODELS, min_size=2, max_size=len(KEYS)),
    )
    def a_cache_and_a_limit(self, limit, models):
        """Below the device's capacity, equal to it, or above."""
        self.state.segments.limits[DEVICE] = limit
        for name, model in zip(KEYS, models, strict=False):
            self._cache(name, model)

    @precondition(lambda self: len(self.clients) < 5)
    @rule(name=st.sampled_from(KEYS), model=SMALL | MODELS)
    def cache(self, name, model):
        """A client publishes a model, unless a step fails, and disconnects."""
        if name not in self.expected:
            self._cache(name, model)

    def _cache(self, name, model):
        self.join()
        number = self.number
        self.publish(self._idle().index(number), name, model, upto="commit")
        self._lose(number)

    @precondition(lambda self: self._idle() and self._committed())
    @rule(which=INDEX, opener=INDEX)
    def attach(self, which, opener):
        self.open(opener, self._pick(self._committed(), which), publish=False)

    # Pins and clocks.

    @rule(name=st.sampled_from(KEYS), pinned=st.sampled_from([True, True, False]))
    def pin(self, name, pinned):
        if name not in self.expected:
            with pytest.raises(ModelNotFoundError):
                self._pin(name, pinned=pinned)
            return
        assert self._pin(name, pinned=pinned) == name
        self.expected[name].pinned = pinned

    def _pin(self, name, *, pinned):
        return self._run(self.handlers.administration.pin(None, messages.Pin(self._request(), name, pinned))).detail

    @rule(seconds=st.sampled_from([-3600.0, 0.5, 60.0]))
    def clock_moves(self, seconds):
        self.now += seconds

    # Compaction.

    @precondition(lambda self: self._idle())
    @rule(which=INDEX)
    def begin_to_compact(self, which):
        number = self._pick(self._idle(), which)
        request = messages.Compact(self._request(), DEVICE)
        (outcome,) = self._together([self.handlers.compaction.compact(self.clients[number], request)])
        if number in self.copying:
            assert isinstance(outcome, ProtocolError)
            return
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, MemoryBackendError), repr(outcome)
            return
        reply = outcome.reply
        if isinstance(reply, messages.Done):
            assert len(outcome.fds) == 0
            return
        target, *sources = self._import(outcome.fds, (reply.target, *reply.sources))
        assert reply.target.nbytes < sum(segment.nbytes for segment in reply.sources)
        read = {self._blobs()[digest].segment for digest in self._read()}
        assert read.isdisjoint(segment.id for segment in reply.sources)
        self.copying[number] = Copying(reply, target, sources)

    @precondition(lambda self: self.copying)
    @rule(which=INDEX, lie=st.booleans())
    def copy(self, which, lie):
        """Copy all blobs; for a lie, flip a bit of the last one that is not empty."""
        copying = self.copying[self._pick(sorted(self.copying), which)]
        try:
            copying.target.map(Access.WRITE)
        except MemoryBackendError:
            return  # sealed by an end that failed
        for mapping in copying.sources:
            mapping.map(Access.READ)
        for move in copying.task.moves:
            found = peek(copying.sources[move.source].address + move.start, move.nbytes)
            assert digest(found) == move.digest  # also of blobs that were removed or got readers meanwhile
            poke(copying.target.address + move.offset, found)
        liable = [move for move in copying.task.moves if move.nbytes]
        copying.right = not (lie and liable)
        if not copying.right:
            address = copying.target.address + liable[-1].offset
            poke(address, bytes([peek(address, 1)[0] ^ 1]))
        for mapping in (copying.target, *copying.sources):
            mapping.unmap()

    @precondition(lambda self: self.copying)
    @rule(which=INDEX)
    def end_to_compact(self, which):
        number = self._pick(sorted(set(self.copying) & set(self._idle())) or [None], which)
        if number is None:
            return
        copying, before = self.copying[number], self.backend.allocated_bytes
        request = messages.Compacted(self._request(), copying.task.target.id)
        (outcome,) = self._together([self.handlers.compaction.compacted(self.clients[number], request)])
        if isinstance(outcome, MemoryBackendError):
            return
        self._forget_copying(number)
        if isinstance(outcome, DigestMismatchError):
            assert not copying.right
            return
        assert copying.right or not any(move.nbytes for move in copying.task.moves)
        if outcome.reply.freed_bytes:
            assert (
                self.backend.allocated_bytes <= before - outcome.reply.freed_bytes
            )  # sources without live blobs are released, too
        self._check_committed()

    @precondition(lambda self: self._idle())
    @rule(which=INDEX, lie=st.sampled_from([False, False, True]))
    def compact(self, which, lie):
        """The steps above in a row, until one fails."""
        number = self._pick(self._idle(), which)
        self.begin_to_compact(self._idle().index(number))
        if number in self.copying:
            self.copy(sorted(self.copying).index(number), lie=lie)
            self.end_to_compact(sorted(set(self.copying) & set(self._idle())).index(number))

    @precondition(lambda self: self.copying)
    @rule(which=INDEX)
    def end_anothers_compaction(self, which):
        number = self._pick(sorted(self.copying), which)
        others = [other for other in self._idle() if other != number]
        if others:
            request = messages.Compacted(self._request(), self.copying[number].task.target.id)
            (outcome,) = self._together([self.handlers.compaction.compacted(self.clients[others[0]], request)])
            assert isinstance(outcome, ProtocolError)

    @rule(share=st.sampled_from([0.0, 0.25, 0.9]))
    def store_compacts(self, share):
        before = self.backend.allocated_bytes
        freed = self.loop.run_until_complete(self.parts.host_compaction.run(DEVICE, share=share))
        assert self.backend.allocated_bytes == before - freed
        self._check_committed()

    @precondition(lambda self: self._idle() and self._committed())
    @rule(which=INDEX, opener=INDEX, moment=st.sampled_from(["create", "map"]))
    def reader_comes_while_the_store_compacts(self, which, opener, moment):
        """During the allocation or the copy; the reader gets the right bytes, and they do not move."""
        reached, may_go_on, call = threading.Event(), threading.Event(), getattr(self.backend, moment)

        def wait(*arguments):
            reached.set()
            may_go_on.wait()
            return call(*arguments)

        setattr(self.backend, moment, wait)
        compaction = self.loop.create_task(self.parts.host_compaction.run(DEVICE))
        while not reached.wait(0.001) and not compaction.done():  # the wait lets its thread run
            self._turn()
        self.attach(which, opener)
        may_go_on.set()
        self.loop.run_until_complete(compaction)
        delattr(self.backend, moment)
        self._check_committed()

    # Quarantine.

    @precondition(lambda self: self._idle() and self._committed())
    @rule(which=INDEX, reporter=INDEX, blob=INDEX, trusted=st.booleans())
    def quarantine(self, which, reporter, blob, trusted):
        """Where the host can read, the store verifies the report (all bytes are right here); else it is trusted."""
        name = self._pick(self._committed(), which)
        model = self.expected[name].committed
        if not model:
            return
        reported = BLOBS[self._pick(model, blob)].digest
        bad = self._blobs()[reported].segment
        inside = set(self.state.segments.at(bad).blobs)
        hit = [one for one in self._committed() if inside & self._digests(one)]
        planned = [one for one, writing in self.writing.items() if inside & writing.counted_on]
        client = self.clients[self._pick(self._idle(), reporter)]
        self.backend.host_readable = not trusted
        request = messages.Quarantine(self._request(), name, (reported, bytes(32)))
        (outcome,) = self._together([self.handlers.quarantining.quarantine(client, request)])
        self.backend.host_readable = True
        if not trusted:
            assert isinstance(outcome, Answer | MemoryBackendError)
            return
        assert isinstance(outcome.reply, messages.Done)
        for one in planned:
            self._forget_plan(one)
        found = self.state.models.withdrawn()
        for one in self.withdrawn.values():
            one.shared -= inside
        for one in hit:
            gone = self.expected.pop(one)
            for token in found.keys() - self.withdrawn.keys():
                if found[token].key == one and gone.readers:
                    self.withdrawn[token] = Withdrawn(
                        one,
                        gone.readers,
                        {reader: self.mapped[reader, one] for reader in gone.readers},
                        self._digests_of(gone) - inside,
                    )

    # Steps of the base class, extended by withdrawn models and compactions.

    def _lose(self, number):
        if number in self.copying:
            self._forget_copying(number)
        for one in self.withdrawn.values():
            one.readers.discard(number)
        self._forget_unread()
        super()._lose(number)

    def _left(self, number, name):
        for one in self.withdrawn.values():
            if one.name == name:
                one.readers.discard(number)
        self._forget_unread()
        super()._left(number, name)

    def _forget_unread(self):
        self.withdrawn = {token: one for token, one in self.withdrawn.items() if one.readers}

    def _forget_copying(self, number):
        copying = self.copying.pop(number)
        for mapping in (copying.target, *copying.sources):
            mapping.close()

    def _committed(self):
        return [name for name, model in self.expected.items() if model.committed is not None]

    def _cached(self):
        return [name for name in self._committed() if not self.expected[name].readers]

    def _digests(self, name):
        return self._digests_of(self.expected[name])

    @staticmethod
    def _digests_of(model):
        return {BLOBS[index].digest for index in model.committed}

    def _read(self):
        """Digests of blobs that a reader maps or a plan counts on."""
        read = set().union(*(self._digests(name) for name in self._committed() if self.expected[name].readers))
        return read.union(
            *(writing.counted_on for writing in self.writing.values()), *(one.shared for one in self.withdrawn.values())
        )

    def _check_committed(self):
        """Check the bytes of every blob at its location."""
        for segment in {entry.segment for entry in self._blobs().values()}:
            mapping = mapping_of(self.clients_backend, self.parts.devices.memory(segment))
            mapping.map(Access.READ)
            for found, held in self._blobs().items():
                if held.segment == segment:
                    assert peek(mapping.address + held.offset, held.nbytes) == DATA[found]
            mapping.close()

    # Invariants.

    @invariant()
    def states_are_as_expected(self):
        found = {
            model.key: (model.publisher, [(one.client, one.publish) for one in model.waiters], model.readers)
            for model in self.state.models.all()
        }
        expected = {
            name: (model.publisher, list(model.waiters), model.readers) for name, model in self.expected.items()
        }
        assert found == expected
        for model in self.state.models.all():
            committed = self.expected[model.key].committed is not None
            assert (model.state is State.COMMITTED) is committed
            assert (model.key in self.state.committed) is committed
            assert (model.publisher is None) is committed
            assert model.pinned is self.expected[model.key].pinned
        assert set(self.state.plans) == set(self.writing)
        withdrawn = {token: (model.key, model.readers) for token, model in self.state.models.withdrawn().items()}
        assert withdrawn == {token: (one.name, one.readers) for token, one in self.withdrawn.items()}
        assert self.state.withdrawn.keys() == withdrawn.keys()

    @invariant()
    def last_uses_are_in_order(self):
        """Whichever way the clock is set."""
        told = {model.key: model.last_used for model in self.state.models.all()}
        by_use = sorted(self._committed(), key=lambda name: self.expected[name].used)
        for earlier, later in itertools.pairwise(by_use):
            assert told[earlier] < told[later] or self.expected[earlier].used == self.expected[later].used

    @invariant()
    def waiting_clients_wait_for_a_publisher_and_for_nothing_else(self):
        waiting = {number for model in self.expected.values() for number, _ in model.waiters}
        assert waiting == set(self.opening)
        assert not any(task.done() for _, task in self.opening.values())

    @invariant()
    def reference_counts_are_exact(self):
        owners = {}
        for name, model in self.expected.items():
            for index in model.committed or ():
                owners.setdefault(BLOBS[index].digest, set()).add(name)
        for name, writing in self.writing.items():
            for known in writing.counted_on:
                owners.setdefault(known, set()).add(f"{name}/{self.expected[name].publisher}")
        for token, one in self.withdrawn.items():
            for shared in one.shared:
                owners.setdefault(shared, set()).add(token)
        assert {digest: entry.references for digest, entry in self._blobs().items()} == owners
        index = {}
        for found, entry in self.state.segments.blobs.all().items():
            for owner in entry.references:
                index.setdefault(owner, set()).add(found)
        assert self.state.segments.blobs.references() == index
        for segment in self.state.segments.all():
            owners = set().union(*(self._blobs()[digest].references for digest in segment.blobs))
            assert self.state.segments.blobs.owners_in(segment.id) == owners

    @invariant()
    def clients_are_involved_with_their_models_alone(self):
        """Withdrawn models are released with the connection of their readers, so they count as well."""
        found = {}
        for model in (*self.state.models.all(), *self.state.models.withdrawn().values()):
            waiters = [waiter.client for waiter in model.waiters]
            for client in {model.publisher, *model.readers, *waiters} - {None}:
                found.setdefault(client, set()).add(model.key)
        assert self.state.models.involved() == found

    @invariant()
    def mapped_segments_exist(self):
        """A segment that a reader maps exists as long as it reads, even if blobs move."""
        there = {entry.id for entry in self.state.segments.all()}
        for name in self._committed():
            for reader in self.expected[name].readers:
                assert self.mapped[reader, name] <= there
        for one in self.withdrawn.values():
            for reader in one.readers:
                assert one.mapped[reader] <= there

    @invariant()
    def segments_have_a_reason_and_are_counted(self):
        segments = self.state.segments
        compactions = {one.token: one for one in self.state.compactions.all()}
        assert {one.client for one in compactions.values()} == set(self.copying)
        writers = {f"{name}/{self.expected[name].publisher}" for name in self.writing} | compactions.keys()
        for held in segments.all():
            assert held.blobs or held.references or held.writer in writers
            assert held.references - self.withdrawn.keys() == {
                token for token, one in compactions.items() if held.id in one.plan.sources
            }
            assert held.quarantined or held.references.isdisjoint(self.withdrawn)
            assert held.live == sum(self._blobs()[digest].nbytes for digest in held.blobs)
            assert held.live <= held.placed <= held.nbytes
            assert held.writer is None or held.writer in writers
            assert held.blobs == {digest for digest, one in self._blobs().items() if one.segment == held.id}
        nbytes = sum(held.nbytes for held in segments.all() if held.allocated)
        assert nbytes == segments.resident_bytes(DEVICE) == self.backend.allocated_bytes
        assert nbytes <= self.backend.capacity
        promised = sum(held.nbytes for held in segments.all())
        assert promised <= segments.limits.get(DEVICE, CAPACITY)
        settled = [held for held in segments.all() if held.settled and not held.quarantined]
        in_use = sum(self._blobs()[digest].nbytes for held in settled for digest in held.blobs)
        assert sum(segments.unused(DEVICE)) == sum(held.nbytes for held in settled) - in_use
        mapped = sum(len(writing.mappings) for writing in self.writing.values())
        mapped += sum(1 + len(copying.sources) for copying in self.copying.values())
        assert open_segments() - self.before == segments.count(DEVICE) + mapped


TestStore = CacheMachine.TestCase
TestStore.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
