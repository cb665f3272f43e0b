"""The pure state of a store under any sequence of events: its references, its limits, and the effects that it returns.

`test_store_machine.py` drives the handlers with real memory and failures. Here the state runs alone, and each effect is
carried out on a model of the process around it: allocated memory, waiting clients, and the keeper.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from support.state_driver import DEVICES, INDEX, KEYS, MIB, MODELS, TURNS, StateDriver, digests

from shared_store.base.errors import ModelInUseError, ModelNotFoundError
from shared_store.store.space.compaction_plan import choose
from shared_store.store.state.clients import Client
from shared_store.store.state.residency import Residency


class StateMachine(StateDriver):
    """See the module."""

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

    @precondition(lambda self: self.state.plans)
    @rule(which=INDEX)
    def fill(self, which):
        self._fill(self._pick(list(self.state.plans), which))

    @precondition(lambda self: self._filled())
    @rule(which=INDEX)
    def commit(self, which):
        self._commit(self._pick(self._filled(), which))

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
            self.around.away.discard((name, number))
            self._carry_out(self.state.leave(self.state.clients[number], name))
            self._forget_unread()

    @rule(name=st.sampled_from(KEYS))
    def remove(self, name):
        if (
            name in self.models
            and not any(read[0] == name for read in self._reading_by_key() | self._away())
            and (name not in self.around.publishing)
        ):
            self._remove(name)
            return
        with pytest.raises(ModelInUseError if self.state.models.get(name) else ModelNotFoundError):
            self.state.remove(name)

    @rule(name=st.sampled_from(KEYS), pinned=st.booleans())
    def pin(self, name, pinned):
        if self.state.models.get(name):
            if pinned:
                self.state.models.pin(name, pinned=True)
            else:
                self._carry_out(self.state.unpin(name)[1])

    @rule(seconds=st.sampled_from([-3600.0, 60.0]))
    def clock_moves(self, seconds):
        self.now += seconds

    # Sleep.

    @precondition(lambda self: self._awake())
    @rule(which=INDEX, upto=st.sampled_from(["promise", "fill", "add", "sleep", "sleep", "sleep"]))
    def sleep(self, which, upto):
        """Make host copies, and go away."""
        name, number = self._pick(self._awake(), which)
        if self._copy_to_host(name, number, upto=upto) and upto == "sleep":
            self._sleep(name, number)

    @precondition(lambda self: self.models)
    @rule(which=INDEX, opener=INDEX)
    def attach_and_sleep(self, which, opener):
        """A client without the model."""
        number, name = self._pick(self._free(), opener), self._pick(sorted(self.models), which)
        if not number or not self.state.resident(name) or self.state.models.get(name).involves(number):
            return
        self._open(number, name, publish=True)
        if (name, number) in self.around.reading and self._copy_to_host(name, number, upto="add"):
            self._sleep(name, number)

    @rule(name=st.sampled_from(KEYS))
    def all_sleep(self, name):
        """All readers of a model."""
        for which, (one, _) in list(enumerate(self._awake()))[::-1]:
            if one == name:
                self.sleep(which, "sleep")

    @precondition(lambda self: self.around.away)
    @rule(which=INDEX, upto=st.sampled_from(["open", "plan", "fill", "commit", "commit"]))
    def wake(self, which, upto):
        """Open, and publish the same blobs if the model is not resident."""
        name, number = self._pick(sorted(self.around.away), which)
        if number not in self._free():
            return
        self._open(number, name, publish=True)
        if self.around.publishing.get(name) == number and name not in self.state.plans:
            self._return(name, upto)

    @precondition(lambda self: self._unplanned_returns())
    @rule(which=INDEX)
    def return_to_the_device(self, which):
        self._return(self._pick(self._unplanned_returns(), which), "commit")

    @rule(which=INDEX, name=st.sampled_from(KEYS), blobs=MODELS)
    def publish_again(self, which, name, blobs):
        """A new client publishes a model that is elsewhere, with the same blobs or with others."""
        number = self._pick(self._free(), which)
        if number and name in self.models and not self.state.resident(name) and name not in self.around.publishing:
            self._open(number, name, publish=True)
            self._plan(name, blobs if which % 2 else self.models[name])
            self._fill(name)
            self._commit(name)

    def _return(self, name, upto):
        if upto != "open":
            self._plan(name, self.models[name])
            if upto != "plan":
                self._fill(name)
            if upto == "commit":
                self._commit(name)

    @precondition(lambda self: self.around.leaving)
    @rule(which=INDEX)
    def release_is_acknowledged(self, which):
        self._acknowledge(self._pick(sorted(self.around.leaving), which))

    @rule(which=INDEX, name=st.sampled_from(KEYS))
    def need_no_host_copies(self, which, name):
        """A client that is awake, or makes them."""
        number = self._pick(sorted(self.state.clients), which)
        if number and (name, number) not in self.around.away:
            self._carry_out(self.state.cancel_copying(name, number))
            self._carry_out(self.state.let_go(name, number))

    @rule(needed=st.sampled_from([1, 4 * MIB]), device=st.sampled_from(["cpu", "disk"]))
    def drop_spare_host_copies(self, needed, device):
        before = self.state.segments.used(device)
        freed, effects = self.state.drop_spare_host_copies(needed, device)
        self._carry_out(effects)
        assert self.state.segments.used(device) == before - freed

    @precondition(lambda self: self.state.tiers.movable())
    @rule(which=INDEX, upto=st.sampled_from(["promise", "fill", "end", "end"]))
    def host_memory_is_short(self, which, upto):
        """The host copy of a segment that left is moved to a file, or that fails."""
        segment = self._pick(sorted(self.state.tiers.movable()), which)
        moving = self.state.tiers.begin_moving(segment)
        self.moving.append(moving)
        if upto != "promise":
            self.around.memory.add(moving.file)
            self.state.segments.fill(moving.file)
        if upto == "end":
            self.end_of_a_move(-1)

    @precondition(lambda self: self.moving)
    @rule(which=INDEX)
    def end_of_a_move(self, which):
        """The segment may be gone, or have returned meanwhile."""
        moving = self.moving.pop(which % len(self.moving))
        if self.state.segments.at(moving.file).allocated:
            before = self.state.segments.has(moving.segment) and self.state.segments.at(moving.segment)
            possible = before and before.host == moving.host and before.residency is Residency.HOST
            moved, effects = self.state.end_moving(moving)
            assert moved is bool(possible)
            self._carry_out(effects)
            if moved:
                assert not self.state.segments.has(moving.host)
                assert before.residency is Residency.DISK
        for _ in range(2):  # idempotent
            self._carry_out(self.state.cancel_moving(moving))

    def _awake(self):
        return sorted(read for read in self.around.reading if read in self._reading_by_key())

    def _unplanned_returns(self):
        return [name for name in self._unplanned() if name in self.models]

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
        hit = [one for one, blobs in self.models.items() if self._device(one) == device and inside & digests(blobs)]
        assert {one.manifest.key for one in done.withdrawn} == set(hit)
        for name in [one for one, known in self.counted_on.items() if self._device(one) == device and inside & known]:
            del self.counted_on[name]
        for name in hit:
            self.counted_on.pop(name, None)
            self.around.away = {read for read in self.around.away if read[0] != name}
        for token in [token for token in self.shared if self._device(token.partition("/")[0]) == device]:
            self.shared[token] -= inside
        for name in hit:
            blobs = self.models.pop(name)
            for token, model in self.state.models.withdrawn().items():
                if model.key == name and token not in self.shared:
                    self.shared[token] = digests(blobs) - inside
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
        counts = {}
        for entry in self.state.segments.blobs.all().values():
            for owner in entry.references:
                owners = counts.setdefault(entry.segment, {})
                owners[owner] = owners.get(owner, 0) + 1
        assert self.state.segments.blobs.counts() == counts
        whole = {}
        for entry in self.state.segments.all():
            for owner in entry.references | ({entry.writer} - {None}):
                whole.setdefault(owner, set()).add(entry.id)
        assert self.state.segments.whole_references() == whole

    @invariant()
    def the_models_of_a_client_are_those_that_it_is_involved_with(self):
        models = self.state.models
        for client in range(1, 1 + max(self.state.clients, default=0)):
            assert models.of(client) == sorted(
                (model for model in models.all() if model.involves(client)), key=lambda model: model.key
            )

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
        assert self._away() == self.around.away
        assert set(state.committed) == set(self.models)
        assert set(state.plans) == set(self.counted_on)
        assert {name: state.turns.holder(name) for name in TURNS if state.turns.holder(name)} == self.around.turns

    @invariant()
    def limits_are_kept(self):
        assert self.state.segments.used("cpu") <= self.limit
        assert sum(
            entry.nbytes for entry in self.state.segments.all() if entry.device == "cpu" and entry.allocated
        ) <= (self.limit)

    @invariant()
    def segments_of_readers_exist(self):
        """Also while their blobs move, and after a quarantine."""
        for segments in self.around.reading.values():
            assert segments <= self.around.memory
            assert not segments & self.state.segments.elsewhere

    @invariant()
    def segments_elsewhere_have_host_copies(self):
        """No reader that is away is without bytes, and no host copy is without a segment."""
        segments = self.state.segments
        for entry in segments.all():
            assert (entry.id in segments.elsewhere) == (entry.residency is not Residency.RESIDENT)
            assert (entry.id in segments.copied) == (entry.host is not None)
            if entry.residency is not Residency.RESIDENT:
                assert entry.host is not None
                assert entry.device != "disk"
            if entry.host is not None:
                host = segments.at(entry.host)
                assert (host.nbytes, host.host_of) == (entry.nbytes, entry.id)
                assert host.device in ("cpu", "disk")
                assert host.device != entry.device
                assert (entry.id in segments.filed) == (host.device == "disk")
                assert host.settled
                assert not host.blobs
                below = Residency.DISK if host.device == "disk" else Residency.HOST
                assert entry.residency in {Residency.RESIDENT, Residency.LEAVING, Residency.RETURNING, below}
            if entry.host_of is not None:
                assert segments.at(entry.host_of).host == entry.id
        for name in {name for name, _ in self.around.away}:
            assert name in self.models
        assert set(segments.elsewhere) >= self.around.leaving

    @invariant()
    def what_sleepers_alone_use_is_not_on_the_device(self):
        """Unless a model in the segment is pinned, is being published or compacted, or a reader is awake."""
        state = self.state
        for name in {name for name, _ in self.around.away}:
            for segment in state.segments_of(name):
                entry = state.segments.at(segment)
                if entry.residency is Residency.RESIDENT and entry.settled and entry.host is not None:
                    owners = {owner for owner in state.segments.owners(segment) if "/needed by " not in owner}
                    models = [state.models.get(owner) for owner in owners]
                    assert any(model is None or model.awake or model.pinned or model.publisher for model in models)

    @invariant()
    def bytes_by_tier_are_exact(self):
        for name, blobs in self.models.items():
            places = [segment for segment, _ in self.state.locations_of(name)]
            resident = sum(
                blob.nbytes
                for blob, segment in zip(blobs, places, strict=True)
                if segment not in self.state.segments.elsewhere
            )
            hosts = [self.state.segments.at(segment).host for segment in places]
            below = {"cpu": 0, "disk": 0}
            for blob, host in zip(blobs, hosts, strict=True):
                if host is not None:
                    below[self.state.segments.at(host).device] += blob.nbytes
            assert self.state.model_bytes.by_tier(name) == (resident, below["cpu"], below["disk"])

    @invariant()
    def the_keeper_knows_all_models_and_their_locations(self):
        assert self.around.kept == {name: self.state.locations_of(name) for name in self.models}


TestState = StateMachine.TestCase
TestState.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
