"""The pure state of a store, driven without I/O: `store/test_store_state.py` adds rules and invariants."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from support.content import key, manifest_of

from shared_store.base.errors import ModelNotFoundError, ProtocolError
from shared_store.base.layout import pack
from shared_store.base.manifest import Blob
from shared_store.store.space.eviction import CachedModel, evict
from shared_store.store.state import publish_plan as plan_module
from shared_store.store.state import segments as segments_module
from shared_store.store.state.committed import Committed
from shared_store.store.state.effects import (
    Forgotten,
    HasTurn,
    Left,
    MayPublish,
    MayRead,
    Refused,
    Released,
    Relocated,
)
from shared_store.store.state.models import Asker, State
from shared_store.store.state.residency import BELOW
from shared_store.store.state.segment_entry import new_id
from shared_store.store.state.store_state import StoreState

MIB = 1 << 20
SIZES = (0, 1, 700, 300_000, MIB, 2 * MIB + 1, 3 * MIB)
BLOBS = tuple(Blob(bytes([number]) * 32, nbytes) for number, nbytes in enumerate(SIZES))
DEVICES = ("cpu", "gpu")
KEYS = tuple(key(number) for number in range(1, 6))
MODELS = st.lists(st.sampled_from(BLOBS), max_size=5)
INDEX = st.integers(0, 7)
TURNS = ("start:cpu", "start:gpu")


@dataclass
class Around:
    """The process around the state, as effects change it.

    `memory`: allocated segments; `waits`: (key, client) of queued opens; `reading` and `publishing`: answers to opens,
    `reading` with the segments that the client maps; `away`: readers that sleep; `leaving`: segments whose release was
    not acknowledged yet; `turns`: holders; `kept`: locations of models, as the keeper has them.
    """

    memory: set[int] = field(default_factory=set)
    waits: set[tuple[str, int]] = field(default_factory=set)
    reading: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    away: set[tuple[str, int]] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)
    publishing: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    kept: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)


class StateDriver(RuleBasedStateMachine):
    """Performs the requests of clients on a `StoreState`, and carries the effects out on a model of the process."""

    def __init__(self):
        super().__init__()
        plan_module.pack = functools.partial(pack, target=4 * MIB)  # models of a few blobs have several segments
        ids = random.Random(1)
        segments_module.new_id = lambda: 1 + ids.randrange((1 << 53) - 1)
        self.now = 1_000_000.0
        self.state = StoreState({}, clock=lambda: self.now)
        self.around = Around()
        self.models = {}  # key: blobs of the committed model
        self.counted_on = {}  # key of a planned publication: digests that were committed before
        self.shared = {}  # token of a withdrawn model: its digests that are not quarantined
        self.moving = []  # moves of host copies to files
        self.number = self.limit = 0

    def teardown(self):
        """Nothing is left after the last client disconnected and all models were removed."""
        plan_module.pack = pack
        segments_module.new_id = new_id
        for moving in self.moving:
            self._carry_out(self.state.cancel_moving(moving))
        for number in list(self.state.clients):
            self._lose(number)
        for name in list(self.models):
            self._remove(name)
        for compaction in self.state.compactions.all():
            assert compaction.client is None  # those of clients ended with them
            self._carry_out(self.state.cancel(compaction))
        self._acknowledge_all()
        assert self.state.segments.all() == self.state.models.all() == self.state.compactions.all() == []
        assert self.state.segments.blobs.all() == self.state.segments.blobs.references() == {}
        assert self.state.plans == self.state.committed == self.state.withdrawn == {}
        assert self.around == Around()

    def _carry_out(self, effects):
        for effect in effects:
            match effect:
                case Released(segment):
                    assert not self.state.segments.has(segment)
                    self.around.memory.discard(segment)  # a promised segment has none
                    self.around.leaving.discard(segment)
                case Left(segment):
                    self.around.leaving.add(segment)
                case Forgotten(name):
                    del self.around.kept[name]
                case Relocated(name):
                    self.around.kept[name] = self.state.locations_of(name)
                case MayPublish(name, client):
                    self.around.waits.remove((name, client))
                    self.around.publishing[name] = client
                case MayRead(name, client):
                    self.around.waits.discard((name, client))  # the publisher does not wait
                    self.around.away.discard((name, client))
                    self.around.reading[name, client] = set(self.state.segments_of(name))
                case Refused(name, client, error):
                    assert isinstance(error, ModelNotFoundError)
                    self.around.waits.remove((name, client))
                case HasTurn(name, client):
                    self.around.turns[name] = client

    def _lose(self, number):
        published = [name for name, publisher in self.around.publishing.items() if publisher == number]
        for name in published:
            self._end_publication(name)
        self.around.waits = {wait for wait in self.around.waits if wait[1] != number}
        self.around.reading = {read: ids for read, ids in self.around.reading.items() if read[1] != number}
        self.around.away = {read for read in self.around.away if read[1] != number}
        self.around.turns = {name: client for name, client in self.around.turns.items() if client != number}
        counted = self.state.counts.snapshot().aborted_publishes
        self._carry_out(self.state.lost(self.state.clients[number]))
        assert self.state.counts.snapshot().aborted_publishes == counted + len(published)
        self._forget_unread()

    def _open(self, number, name, *, publish):
        model = self.state.models.get(name)
        involved = {model.publisher, *model.awake} if model else set()
        resident = self.state.resident(name)
        device = DEVICES[KEYS.index(name) % 2]
        self.around.waits.add((name, number))
        try:
            outcomes = self.state.open(name, Asker(number, publish), name="m", engine="e", device=device)
        except ProtocolError:
            refused = number in involved
        except ModelNotFoundError:
            refused = not publish and (model is None or not resident)
        else:
            assert number not in involved
            self._carry_out(outcomes)
            return
        assert refused
        self.around.waits.remove((name, number))

    def _plan(self, name, blobs):
        """Admit as the store does: evict by the policy, or leave everything as it was."""
        state, number = self.state, self.around.publishing[name]
        self._acknowledge_all()  # the handler waits for it
        here = {
            digest: entry
            for (device, digest), entry in state.segments.blobs.all().items()
            if device == self._device(name)
        }
        before = {digest for digest, entry in here.items() if entry.segment not in state.segments.elsewhere}
        whole = self._device(name) == "cpu" or number % 2 == 0  # a GPU's publisher says if it writes the rest
        segments = {entry.segment for entry in here.values()}
        below = {segment for segment in segments if state.segments.at(segment).residency in BELOW}
        draft = state.draft(name, number, blobs, None, whole=whole)
        state.segments.refer_known(draft)
        missing = state.segments.missing(draft.device, draft.nbytes)
        if missing > 0:
            cached = [
                CachedModel(model.key, model.last_used, len(model.readers), model.pinned)
                for model in state.models.all()
                if model.state is State.COMMITTED and model.device == draft.device
            ]
            chosen = evict(cached, state.segments.occupied(draft.device), missing)
            if chosen is None:
                self._carry_out(state.drop(draft.token))
                return
            for victim in chosen:
                self._remove(victim)
            assert state.segments.missing(draft.device, draft.nbytes) <= 0
        state.plans[name] = plan = state.segments.promise_plan(draft)
        self.counted_on[name] = {blob.digest for blob in blobs} & here.keys()
        if whole:  # what left returns to its own place
            for blob, location in zip(blobs, plan.locations, strict=True):
                entry = here.get(blob.digest)
                if entry is not None and entry.segment in below:
                    assert (location.segment, location.offset) == (entry.segment, entry.offset)
                    assert location.segment in plan.returning
        new = [blob.digest for blob, location in zip(blobs, plan.locations, strict=True) if location.new]
        assert sorted(new) == sorted({blob.digest for blob in blobs} - before)
        assert set(plan.written) == set(plan.segments)

    def _fill(self, name):
        for segment in self.state.plans[name].segments if name in self.state.plans else ():
            if not self.state.segments.at(segment).allocated:
                self.around.memory.add(segment)
                self.state.segments.fill(segment)

    def _commit(self, name):
        if name not in self._filled():
            return
        plan, number = self.state.plans[name], self.around.publishing.pop(name)
        manifest = manifest_of(name, plan.blobs, device=self._device(name))
        del self.counted_on[name]
        self._carry_out(self.state.commit(name, number, Committed(b"", manifest)))
        self.models[name] = plan.blobs
        assert self.state.resident(name)
        self.around.kept[name] = self.state.locations_of(name)  # the handler notes a committed model
        assert (name, number) in self.around.reading

    def _acknowledge(self, segment):
        self.around.leaving.remove(segment)
        self.around.memory.discard(segment)  # one that was not filled has none
        assert self.state.segments.released(segment)

    def _acknowledge_all(self):
        for segment in list(self.around.leaving):
            self._acknowledge(segment)

    def _copy_to_host(self, name, number, *, upto):
        """Make the host copies of a model that a client reads, if the limit permits; return whether it has all."""
        state = self.state
        segments = state.segments_of(name)
        if state.tiers.being_copied(segments):
            return False
        missing = state.tiers.without_host_copy(segments)
        needed = sum(state.segments.at(segment).nbytes for segment in missing)
        device = "disk" if self._device(name) == "cpu" else "cpu"
        if state.segments.missing(device, needed) > 0:
            self._carry_out(state.drop_spare_host_copies(needed)[1])
            missing = state.tiers.without_host_copy(segments)
            needed = sum(state.segments.at(segment).nbytes for segment in missing)
            if state.segments.missing(device, needed) > 0:
                device = "disk"  # host memory is short
        self._carry_out(state.need(name, number, segments))
        if missing:
            copying = state.tiers.begin_copying(name, number, missing, device)
            if upto == "promise":
                return False
            for host in copying.copies.values():
                self.around.memory.add(host)
                state.segments.fill(host)
            if upto == "fill":
                return False
            self._carry_out(state.end_copying(copying))
        return True

    def _sleep(self, name, number):
        if (name, number) in self._reading_withdrawn():
            self.around.reading[name, number] = set()  # it reads an earlier model of this name, too
        else:
            del self.around.reading[name, number]
        self.around.away.add((name, number))
        self._carry_out(self.state.go_away(self.state.clients[number], name))

    def _remove(self, name):
        del self.models[name]
        removed, effects = self.state.remove(name)
        assert removed == name
        self._carry_out(effects)

    def _end_publication(self, name):
        del self.around.publishing[name]
        self.counted_on.pop(name, None)

    def _forget_unread(self):
        withdrawn = self.state.models.withdrawn()
        self.shared = {token: shared for token, shared in self.shared.items() if token in withdrawn}

    def _queued(self):
        return {(model.key, waiter.client) for model in self.state.models.all() for waiter in model.waiters}

    def _reading_by_key(self):
        return {(model.key, reader) for model in self.state.models.all() for reader in model.awake}

    def _away(self):
        return {(model.key, reader) for model in self.state.models.all() for reader in model.away}

    def _reading_withdrawn(self):
        return {(model.key, reader) for model in self.state.models.withdrawn().values() for reader in model.readers}

    def _free(self):
        """Clients that do not wait."""
        waiting = {number for _, number in self.around.waits}
        return [number for number in sorted(self.state.clients) if number not in waiting]

    def _unplanned(self):
        return [name for name in self.around.publishing if name not in self.state.plans]

    def _filled(self):
        return [name for name, plan in self.state.plans.items() if self.state.segments.filled(plan)]

    def _settled(self):
        return [entry.id for entry in self.state.segments.all() if entry.settled and entry.blobs]

    @staticmethod
    def _device(name):
        return DEVICES[KEYS.index(name) % 2]

    @staticmethod
    def _pick(options, which):
        return options[which % len(options)] if options else None


def digests(blobs):
    return {blob.digest for blob in blobs}
