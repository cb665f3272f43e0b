"""The pure state of a store under any sequence of events: its references, its limits, and the effects that it returns.

`test_store_machine.py` drives the handlers with real memory and failures. Here the state runs alone, and each effect is
carried out on a model of the process around it: allocated memory, waiting clients, and the keeper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.content import key, manifest_of

from shared_store.base.errors import ModelInUseError, ModelNotFoundError, ProtocolError
from shared_store.base.layout import pack
from shared_store.base.manifest import Blob
from shared_store.store.space.compaction_plan import choose
from shared_store.store.space.eviction import CachedModel, evict
from shared_store.store.state import publish_plan as plan_module
from shared_store.store.state.clients import Client
from shared_store.store.state.committed import Committed
from shared_store.store.state.effects import Forgotten, HasTurn, MayPublish, MayRead, Refused, Released, Relocated
from shared_store.store.state.models import Asker, State
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
    `reading` with the segments that the client maps; `turns`: holders; `kept`: locations of models, as the keeper has
    them.
    """

    memory: set[int] = field(default_factory=set)
    waits: set[tuple[str, int]] = field(default_factory=set)
    reading: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    publishing: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    kept: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)


class StateMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self):
        super().__init__()
        plan_module.pack = functools.partial(pack, target=4 * MIB)  # models of a few blobs have several segments
        self.now = 1_000_000.0
        self.state = StoreState({}, clock=lambda: self.now)
        self.around = Around()
        self.models = {}  # key: blobs of the committed model
        self.counted_on = {}  # key of a planned publication: digests that were committed before
        self.shared = {}  # token of a withdrawn model: its digests that are not quarantined
        self.number = self.limit = 0

    def teardown(self):
        """Nothing is left after the last client disconnected and all models were removed."""
        plan_module.pack = pack
        for number in list(self.state.clients):
            self._lose(number)
        for name in list(self.models):
            self._remove(name)
        assert self.state.segments.all() == self.state.models.all() == self.state.compactions.all() == []
        assert self.state.segments.blobs.all() == self.state.segments.blobs.references() == {}
        assert self.state.plans == self.state.committed == self.state.withdrawn == {}
        assert self.around == Around()

    # The process around the state.

    def _carry_out(self, effects):
        for effect in effects:
            match effect:
                case Released(segment):
                    assert not self.state.segments.has(segment)
                    self.around.memory.discard(segment)  # a promised segment has none
                case Forgotten(name):
                    del self.around.kept[name]
                case Relocated(name):
                    self.around.kept[name] = self.state.locations_of(name)
                case MayPublish(name, client):
                    self.around.waits.remove((name, client))
                    self.around.publishing[name] = client
                case MayRead(name, client):
                    self.around.waits.discard((name, client))  # the publisher does not wait
                    self.around.reading[name, client] = set(self.state.segments_of(name))
                case Refused(name, client, error):
                    assert isinstance(error, ModelNotFoundError)
                    self.around.waits.remove((name, client))
                case HasTurn(name, client):
                    self.around.turns[name] = client

    # Clients.

    @initialize(limit=st.sampled_from([6 * MIB, 10 * MIB, 1 << 40]), models=st.lists(MODELS, max_size=len(KEYS)))
    def a_limit_a_cache_and_two_clients(self, limit, models):
        """Random steps alone would rarely fill a store with models without readers."""
        self.limit = self.state.segments.limits["cpu"] = limit
        self.join()
        self.join()
        for name, blobs in zip(KEYS, models, strict=False):
            self.cache(name, blobs)

    @precondition(lambda self: len(self.state.clients) < 5)
    @rule()
    def join(self):
        self.number += 1
        self.state.clients[self.number] = Client(self.number, 1, 1, "")

    @precondition(lambda self: self.state.clients)
    @rule(which=INDEX)
    def lose(self, which):
        self._lose(self._pick(sorted(self.state.clients), which))

    def _lose(self, number):
        published = [name for name, publisher in self.around.publishing.items() if publisher == number]
        for name in published:
            self._end_publication(name)
        self.around.waits = {wait for wait in self.around.waits if wait[1] != number}
        self.around.reading = {read: ids for read, ids in self.around.reading.items() if read[1] != number}
        self.around.turns = {name: client for name, client in self.around.turns.items() if client != number}
        counted = self.state.counts.snapshot().aborted_publishes
        self._carry_out(self.state.lost(self.state.clients[number]))
        assert self.state.counts.snapshot().aborted_publishes == counted + len(published)
        self._forget_unread()

    @rule(which=INDEX, name=st.sampled_from(TURNS))
    def acquire_a_turn(self, which, name):
        if number := self._pick(self._free(), which):
            try:
                if self.state.turns.acquire(name, number):
                    assert name not in self.around.turns
                    self.around.turns[name] = number
            except ValueError:
                assert name in self.around.turns

    @rule(which=st.permutations(range(3)), name=st.sampled_from(TURNS))
    def queue_for_a_turn(self, which, name):
        """Several clients, one after the other."""
        for one in which[:2]:
            self.acquire_a_turn(one, name)

    @rule(which=INDEX, name=st.sampled_from(TURNS))
    def yield_a_turn(self, which, name):
        holder = self.state.turns.holder(name)
        if number := holder if which < 4 else self._pick(self._free(), which):
            if self.around.turns.get(name) == number:
                del self.around.turns[name]
            self._carry_out(self.state.turns.leave(name, number))

    # Models.

    @rule(which=INDEX, name=st.sampled_from(KEYS), publish=st.sampled_from([True, True, False]))
    def open(self, which, name, publish):
        if number := self._pick(self._free(), which):
            self._open(number, name, publish=publish)

    def _open(self, number, name, *, publish):
        model = self.state.models.get(name)
        involved = {model.publisher, *model.readers} if model else set()
        device = DEVICES[KEYS.index(name) % 2]
        self.around.waits.add((name, number))
        try:
            outcomes = self.state.models.open(name, Asker(number, publish), name="m", engine="e", device=device)
        except ProtocolError:
            refused = number in involved
        except ModelNotFoundError:
            refused = model is None and not publish
        else:
            assert number not in involved
            self._carry_out(outcomes)
            return
        assert refused
        self.around.waits.remove((name, number))

    @rule(which=INDEX, name=st.sampled_from(KEYS), blobs=MODELS, upto=st.sampled_from(["plan", "fill", "commit"]))
    def publish(self, which, name, blobs, upto):
        """The steps of a publication in a row."""
        number = self._pick(self._free(), which)
        if number and self.state.models.get(name) is None:
            self._open(number, name, publish=True)
            self._plan(name, blobs)
            if upto != "plan":
                self._fill(name)
            if upto == "commit":
                self._commit(name)

    @rule(name=st.sampled_from(KEYS), blobs=MODELS)
    def cache(self, name, blobs):
        """A client publishes a model, unless it exceeds the limit, and disconnects."""
        self.join()
        if self.state.models.get(name) is None:
            self._open(self.number, name, publish=True)
            self._plan(name, blobs)
            self._fill(name)
            self._commit(name)
        self._lose(self.number)

    @precondition(lambda self: self._unplanned())
    @rule(which=INDEX, blobs=MODELS)
    def plan(self, which, blobs):
        self._plan(self._pick(self._unplanned(), which), blobs)

    def _plan(self, name, blobs):
        """Admit as the store does: evict by the policy, or leave everything as it was."""
        state, number = self.state, self.around.publishing[name]
        before = {digest for (device, digest) in state.segments.blobs.all() if device == self._device(name)}
        draft = state.draft(name, number, blobs, None)
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
        self.counted_on[name] = {blob.digest for blob in blobs} & before
        new = [blob.digest for blob, location in zip(blobs, plan.locations, strict=True) if location.new]
        assert sorted(new) == sorted({blob.digest for blob in blobs} - before)
        assert set(plan.written) == set(plan.segments)

    @precondition(lambda self: self.state.plans)
    @rule(which=INDEX)
    def fill(self, which):
        self._fill(self._pick(list(self.state.plans), which))

    def _fill(self, name):
        for segment in self.state.plans[name].segments if name in self.state.plans else ():
            if not self.state.segments.at(segment).allocated:
                self.around.memory.add(segment)
                self.state.segments.fill(segment)

    @precondition(lambda self: self._filled())
    @rule(which=INDEX)
    def commit(self, which):
        self._commit(self._pick(self._filled(), which))

    def _commit(self, name):
        if name not in self._filled():
            return
        plan, number = self.state.plans[name], self.around.publishing.pop(name)
        manifest = manifest_of(name, plan.blobs, device=self._device(name))
        del self.counted_on[name]
        self._carry_out(self.state.commit(name, number, Committed(b"", manifest)))
        self.models[name] = plan.blobs
        self.around.kept[name] = self.state.locations_of(name)  # the handler notes a committed model
        assert (name, number) in self.around.reading

    @precondition(lambda self: self.counted_on)
    @rule(which=INDEX)
    def bytes_turn_out_wrong(self, which):
        """The plan is dropped; the client is still the publisher."""
        name = self._pick(list(self.counted_on), which)
        del self.counted_on[name]
        self._carry_out(self.state.drop_plan(name))

    @precondition(lambda self: self.around.publishing)
    @rule(which=INDEX)
    def abort(self, which):
        name = self._pick(list(self.around.publishing), which)
        number = self.around.publishing[name]
        self._end_publication(name)
        self._carry_out(self.state.abort(name, number))

    @rule(which=INDEX, name=st.sampled_from(KEYS))
    def leave(self, which, name):
        number = self._pick(sorted(self.state.clients), which)
        if number:
            if self.around.publishing.get(name) == number:
                self._end_publication(name)
            self.around.waits.discard((name, number))
            self.around.reading.pop((name, number), None)
            self._carry_out(self.state.leave(self.state.clients[number], name))
            self._forget_unread()

    @rule(name=st.sampled_from(KEYS))
    def remove(self, name):
        if name in self.models and not any(read[0] == name for read in self._reading_by_key()):
            self._remove(name)
            return
        with pytest.raises(ModelInUseError if self.state.models.get(name) else ModelNotFoundError):
            self.state.remove(name)

    def _remove(self, name):
        del self.models[name]
        removed, effects = self.state.remove(name)
        assert removed == name
        self._carry_out(effects)

    @rule(name=st.sampled_from(KEYS), pinned=st.booleans())
    def pin(self, name, pinned):
        if self.state.models.get(name):
            self.state.models.pin(name, pinned=pinned)

    @rule(seconds=st.sampled_from([-3600.0, 60.0]))
    def clock_moves(self, seconds):
        self.now += seconds

    # Compaction and quarantine.

    @rule(device=st.sampled_from(DEVICES), which=INDEX)
    def compact(self, device, which):
        """Begin and end a compaction in one step."""
        before = len(self.state.compactions.all())
        self.begin_to_compact(device, which)
        if len(self.state.compactions.all()) > before:
            self.end_to_compact(before)

    @rule(device=st.sampled_from(DEVICES), which=INDEX)
    def begin_to_compact(self, device, which):
        free = self.limit - self.state.segments.used(device) if device == "cpu" else 1 << 40
        plan = choose(self.state.compactions.sources(device), free=free)
        if plan is not None:
            compaction = self.state.compactions.begin(device, plan, self._pick(sorted(self.state.clients), which))
            self.around.memory.add(compaction.segment)
            self.state.segments.fill(compaction.segment)

    @precondition(lambda self: self.state.compactions.all())
    @rule(which=INDEX)
    def end_to_compact(self, which):
        before = sum(entry.nbytes for entry in self.state.segments.all())
        moved, freed, effects = self.state.end_compaction(self._pick(self.state.compactions.all(), which))
        self._carry_out(effects)
        after = sum(entry.nbytes for entry in self.state.segments.all())
        assert after <= before - freed
        assert bool(moved) <= bool(freed)

    @precondition(lambda self: self.state.compactions.all())
    @rule(which=INDEX)
    def cancel_to_compact(self, which):
        compaction = self._pick(self.state.compactions.all(), which)
        for _ in range(2):  # idempotent
            self._carry_out(self.state.cancel(compaction))

    @precondition(lambda self: self._settled())
    @rule(which=INDEX)
    def quarantine(self, which):
        bad = self._pick(self._settled(), which)
        inside = set(self.state.segments.at(bad).blobs)
        device = self.state.segments.at(bad).device
        done = self.state.quarantine([bad])
        assert done.segments == (bad,)
        hit = [one for one, blobs in self.models.items() if self._device(one) == device and inside & _digests(blobs)]
        assert {one.manifest.key for one in done.withdrawn} == set(hit)
        for name in [one for one, known in self.counted_on.items() if self._device(one) == device and inside & known]:
            del self.counted_on[name]
        for token in [token for token in self.shared if self._device(token.partition("/")[0]) == device]:
            self.shared[token] -= inside
        for name in hit:
            blobs = self.models.pop(name)
            for token, model in self.state.models.withdrawn().items():
                if model.key == name and token not in self.shared:
                    self.shared[token] = _digests(blobs) - inside
        self._carry_out(done.effects)

    # What holds after every step.

    @invariant()
    def references_are_exact(self):
        expected = {}
        for name, blobs in self.models.items():
            for blob in blobs:
                expected.setdefault((self._device(name), blob.digest), set()).add(name)
        for name, known in self.counted_on.items():
            for digest in known:
                expected.setdefault((self._device(name), digest), set()).add(self.state.plans[name].token)
        for token, shared in self.shared.items():
            for digest in shared:
                expected.setdefault((self._device(token.partition("/")[0]), digest), set()).add(token)
        found = self.state.segments.blobs.all()
        assert {where: entry.references for where, entry in found.items()} == expected

    @invariant()
    def the_index_of_owners_is_that_of_the_references(self):
        index = {}
        for where, entry in self.state.segments.blobs.all().items():
            for owner in entry.references:
                index.setdefault(owner, set()).add(where)
        assert self.state.segments.blobs.references() == index
        whole = {}
        for entry in self.state.segments.all():
            for owner in entry.references | ({entry.writer} - {None}):
                whole.setdefault(owner, set()).add(entry.id)
        assert self.state.segments.whole_references() == whole

    @invariant()
    def segments_are_needed_and_counted(self):
        segments = self.state.segments
        for entry in segments.all():
            assert entry.blobs or entry.references or entry.writer
            assert 0 <= entry.live <= entry.placed <= entry.nbytes
            there = {digest for (_, digest), blob in segments.blobs.all().items() if blob.segment == entry.id}
            assert entry.blobs == there
            assert entry.live == sum(segments.blobs.at(entry.device, digest).nbytes for digest in there)
            assert all(start + blob.nbytes <= entry.nbytes for blob, start in segments.contents(entry.id))
        assert {entry.id for entry in segments.all() if entry.allocated} == self.around.memory

    @invariant()
    def models_are_as_effects_said(self):
        state = self.state
        assert {model.key: model.publisher for model in state.models.all() if model.publisher} == self.around.publishing
        assert self._queued() == self.around.waits
        assert self._reading_by_key() | self._reading_withdrawn() == self.around.reading.keys()
        assert set(state.committed) == set(self.models)
        assert set(state.plans) == set(self.counted_on)
        assert {name: state.turns.holder(name) for name in TURNS if state.turns.holder(name)} == self.around.turns

    @invariant()
    def limits_are_kept(self):
        assert sum(entry.nbytes for entry in self.state.segments.all() if entry.device == "cpu") <= self.limit

    @invariant()
    def segments_of_readers_exist(self):
        """Also while their blobs move, and after a quarantine."""
        for segments in self.around.reading.values():
            assert segments <= self.around.memory

    @invariant()
    def the_keeper_knows_all_models_and_their_locations(self):
        assert self.around.kept == {name: self.state.locations_of(name) for name in self.models}

    # Questions.

    def _end_publication(self, name):
        del self.around.publishing[name]
        self.counted_on.pop(name, None)

    def _forget_unread(self):
        withdrawn = self.state.models.withdrawn()
        self.shared = {token: shared for token, shared in self.shared.items() if token in withdrawn}

    def _queued(self):
        return {(model.key, waiter.client) for model in self.state.models.all() for waiter in model.waiters}

    def _reading_by_key(self):
        return {(model.key, reader) for model in self.state.models.all() for reader in model.readers}

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


def _digests(blobs):
    return {blob.digest for blob in blobs}


TestState = StateMachine.TestCase
TestState.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
