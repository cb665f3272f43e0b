"""The whole state of a store, and the rules that concern several parts of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared_store.base.errors import ModelNotFoundError
from shared_store.base.layout import Layout
from shared_store.base.manifest import Blob, Manifest
from shared_store.store.state.accounts import Accounts, MemoryRules
from shared_store.store.state.clients import Client
from shared_store.store.state.committed import Committed
from shared_store.store.state.compactions import Compaction, Compactions
from shared_store.store.state.counts import Counts
from shared_store.store.state.effects import Effect, Forgotten, Left, Released, Relocated
from shared_store.store.state.files import FileDigests
from shared_store.store.state.grace import Grace
from shared_store.store.state.model_bytes import ModelBytes
from shared_store.store.state.models import Asker, Dropped, Models, Outcome, State, Unplanned, Withdrawn
from shared_store.store.state.publish_plan import Draft, PublishPlan, draft
from shared_store.store.state.residency import FILES, HOST, Residency
from shared_store.store.state.segments import Segments
from shared_store.store.state.tiers import HostCopying, Moving, Tiers, Use
from shared_store.store.state.turns import Turns
from shared_store.store.state.workloads import Workloads


@dataclass(frozen=True)
class Quarantined:
    """The result of a quarantine: the segments, the models that were withdrawn, and the effects."""

    segments: tuple[int, ...]
    withdrawn: tuple[Committed, ...]
    effects: tuple[Effect, ...]


class StoreState:
    """Models, segments, clients and turns. Methods return effects that the caller must carry out."""

    def __init__(
        self,
        limits: Mapping[str, int],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        rules: MemoryRules | None = None,
    ) -> None:
        """Begin empty.

        Args:
            limits: most bytes of segments by device; no entry: no limit.
            clock: returns Unix seconds.
            monotonic: returns monotonic seconds.
            rules: settings of overcommit.
        """
        rules = rules or MemoryRules()
        self.segments = Segments(limits)
        self.workloads = Workloads(rules.max_priority, monotonic)
        self.accounts = Accounts(self.segments, self.workloads, rules.budgets, rules.reserve)
        self.models = Models(clock)
        self.tiers = Tiers(self.segments, self._use)
        self.compactions = Compactions(self.segments, self.models.unread)
        self.turns = Turns()
        self.grace = Grace(monotonic)
        self.files = FileDigests()
        self.counts = Counts()
        self.clients: dict[int, Client] = {}
        self.committed: dict[str, Committed] = {}
        self.model_bytes = ModelBytes(self.segments, self.committed)
        self.withdrawn: dict[str, Committed] = {}  # by the tokens of `models`
        self.plans: dict[str, PublishPlan] = {}
        self._asleep: set[tuple[int, str]] = set()

    # Publications.

    def draft(
        self, key: str, client: int, blobs: Sequence[Blob], preferred: Layout | None, *, whole: bool = False
    ) -> Draft:
        """Lay out a publisher's new blobs; the state does not change. Raises as :func:`draft` does.

        ``whole``: segments return although they have blobs of other models, too.
        """
        device = self.models.publishing(key, client).device
        elsewhere = self.tiers.elsewhere(device, blobs, preferred, whole=whole)
        return draft(self.segments.blobs, device, f"{key}/{client}", blobs, preferred, elsewhere)

    def drop_plan(self, key: str) -> list[Effect]:
        """Drop the plan of a publication, if it has one, and its promised segments."""
        plan = self.plans.pop(key, None)
        if plan is None:
            return []
        self.workloads.unpublished(plan.token)
        return self.drop(plan.token)

    def drop(self, owner: str) -> list[Effect]:
        """Remove all references of an owner."""
        failed = self.segments.fail_returning(owner)
        released = self.segments.drop(owner)
        released += self.segments.sweep(failed)  # all their blobs may have moved meanwhile
        self.tiers.forget(released)
        return [*(Left(segment) for segment in failed if self.segments.has(segment)), *map(Released, released)]

    def commit(self, key: str, client: int, committed: Committed) -> list[Effect]:
        """Make a model visible whose bytes were verified. The publisher and all waiters read it."""
        returning = self.models.publishing(key, client).state is State.RETURNING
        outcomes = self.models.commit(key, client)
        plan = self.plans.pop(key)
        if returning:  # it may have other blobs than it had, if the publisher loaded it
            self.segments.blobs.rename(key, f"{key}/former")
        device = committed.manifest.device
        before = self._elsewhere(device, plan)
        shared = self.segments.commit(key, plan)
        self.tiers.moved(device, self._moved(device, before))
        self.tiers.may_leave(plan.returning)  # once no reader is awake again
        self.committed[key] = committed
        self.counts.add("returns" if returning else "publishes")
        # The keeper must know the new locations before it releases the old segments.
        relocated = sorted(shared.relocated & self.committed.keys()) + [key] * returning
        effects = [*self._relocated(relocated), *self._apply(outcomes)]
        self.tiers.forget(shared.released)
        return [*effects, *map(Released, shared.released), *self.drop(f"{key}/former"), *self.leave_devices()]

    def _elsewhere(self, device: str, plan: PublishPlan) -> dict[bytes, tuple[int, int]]:
        """Return the locations (segment id, first byte) of those blobs of a plan that are not on their device."""
        if not self.segments.elsewhere:
            return {}
        present = self.segments.blobs.present(device, (blob.digest for blob in plan.blobs))
        return {
            digest: (entry.segment, entry.offset)
            for digest, entry in present.items()
            if entry.segment in self.segments.elsewhere
        }

    def _moved(self, device: str, before: dict[bytes, tuple[int, int]]) -> dict[bytes, tuple[int, int]]:
        """Return those of the locations that are no longer the blobs' own."""
        present = self.segments.blobs.present(device, before)
        return {digest: place for digest, place in before.items() if present[digest].segment != place[0]}

    def abort(self, key: str, client: int) -> list[Effect]:
        """End a publication without a commit."""
        outcomes = self.models.abort(key, client)
        self.counts.add("aborted_publishes")
        return [*self._apply(outcomes), *self.leave_devices()]

    # Readers.

    def open(self, key: str, asker: Asker, *, name: str, engine: str, device: str) -> list[Outcome]:
        """Open a model for a client. Raises as :meth:`Models.open` does."""
        return self.models.open(key, asker, name=name, engine=engine, device=device, resident=self.resident(key))

    def resident(self, key: str) -> bool:
        """Whether all segments of a model are on its device; True for one that is not committed."""
        if not self.segments.elsewhere or key not in self.committed:
            return True
        return self.segments.elsewhere.isdisjoint(self.segments_of(key))

    def read_again(self, client: Client, key: str, private_bytes: int) -> None:
        """Make a client a reader of a committed model that it has read since before a restart."""
        model = self.committed[key].manifest
        asker = Asker(client.number, publish=False)
        self.models.open(key, asker, name=model.name, engine=model.engine, device=model.device)
        client.private_bytes[key] = max(0, private_bytes)

    def reads(self, client: Client, key: str) -> bool:
        """Return True if a client reads a model, or one with this key that was withdrawn."""
        model = self.models.get(key)
        models = [*([] if model is None else [model]), *self.models.withdrawn().values()]
        return any(client.number in one.readers for one in models if one.key == key)

    def sleep_again(self, client: Client, key: str, private_bytes: int, segments: Iterable[int]) -> list[Effect]:
        """Make a client a reader that is away, and that has slept since before a restart.

        ``segments``: whose host copies it has.
        """
        self.read_again(client, key, private_bytes)
        self.models.go_away(key, client.number)
        self._asleep.add((client.number, key))
        effects = self.need(key, client.number, segments)
        self.tiers.may_leave(self.segments_of(key))
        return [*effects, *self.leave_devices()]

    def leave(self, client: Client, key: str) -> list[Effect]:
        """Remove a client from the readers, waiters or publishers of a model."""
        client.private_bytes.pop(key, None)
        effects = self._apply(self.models.leave(key, client.number))
        effects += self.cancel_copying(key, client.number)
        return [*effects, *self.let_go(key, client.number), *self.leave_devices()]

    def lost(self, client: Client) -> list[Effect]:
        """Remove a client from everything, because its connection ended."""
        self.clients.pop(client.number, None)
        self.workloads.lost(client.number)
        for model in self.models.of(client.number):
            if model.publisher == client.number:
                self.counts.add("aborted_publishes")
        effects: list[Effect] = [*self.turns.lost(client.number)]
        effects += self._apply(self.models.lost(client.number))
        for compaction in self.compactions.by(client.number):
            effects += self.cancel(compaction)
        for key in self.tiers.needed_by(client.number):
            self._asleep.discard((client.number, key))
        effects += map(Released, self.tiers.lost(client.number))
        return [*effects, *self.leave_devices()]

    # Readers that sleep.

    def go_away(self, client: Client, key: str) -> list[Effect]:
        """Record that a reader sleeps. Segments without readers that are awake leave their devices.

        Raises:
            ModelNotFoundError: the client does not read the model, or there are no host copies.
        """
        effects: list[Effect] = []
        if not self.tiers.needs(key, client.number):  # it may have made them for a store before this one
            if key not in self.committed or self.tiers.without_host_copy(self.segments_of(key)):
                raise ModelNotFoundError(f"there are no host copies of {key}")
            effects = self.need(key, client.number, self.segments_of(key))
        self.models.go_away(key, client.number)
        if (client.number, key) not in self._asleep:
            self._asleep.add((client.number, key))
            self.counts.add("sleeps")
        if key in self.committed:
            self.tiers.may_leave(self.segments_of(key))
        return [*effects, *self.leave_devices()]

    def need(self, key: str, client: int, segments: Iterable[int]) -> list[Effect]:
        """Record that a client needs the host copies of these segments of a model, in place of what it needed."""
        return [*map(Released, self.tiers.need(key, client, segments))]

    def let_go(self, key: str, client: int) -> list[Effect]:
        """Record that a client needs no host copies of a model any more. Idempotent."""
        self._asleep.discard((client, key))
        return [*map(Released, self.tiers.let_go(key, client))]

    def cancel_copying(self, key: str, client: int) -> list[Effect]:
        """Drop the host copies that a client makes. Idempotent."""
        return [*map(Released, self.tiers.cancel_copying(key, client))]

    def end_copying(self, copying: HostCopying) -> list[Effect]:
        """Add verified host copies to their segments."""
        return [*map(Released, self.tiers.end_copying(copying)), *self.leave_devices()]

    def end_moving(self, moving: Moving) -> tuple[bool, list[Effect]]:
        """Make a verified file the host copy of its segment. Returns whether that is still possible, and effects."""
        released = self.tiers.end_moving(moving)
        if released is None:
            return False, []
        owners = self.segments.owners(moving.segment) & self.committed.keys()
        # The keeper must have the file before it closes the memory.
        return True, [*self._relocated(sorted(owners)), *map(Released, released)]

    def cancel_moving(self, moving: Moving) -> list[Effect]:
        """End a move that failed. Idempotent, and without effect after its end."""
        return [*map(Released, self.tiers.cancel_moving(moving))]

    def last_used(self, segment: int) -> float:
        """Return when the last of the models in a segment was used last, in Unix seconds."""
        models = map(self.models.get, self.segments.owners(segment))
        return max((model.last_used for model in models if model is not None), default=0.0)

    def woke(self, client: int, key: str) -> bool:
        """Whether this attachment ends a client's sleep. Counts it."""
        woke = (client, key) in self._asleep
        if woke:
            self._asleep.discard((client, key))
            self.counts.add("wakes")
        return woke

    def leave_devices(self) -> list[Effect]:
        """Move segments to lower tiers whose readers are all away; none during the grace period."""
        if self.grace.active:
            return []
        left, emptied, relocated = self.tiers.leave()
        moved = self._relocated(sorted(relocated & self.committed.keys()))
        return [*moved, *map(Left, left), *map(Released, emptied)]

    def drop_spare_host_copies(self, needed: int, device: str = HOST) -> tuple[int, list[Effect]]:
        """Drop host copies of resident segments that no client needs, to free ``needed`` bytes of a device.

        Returns:
            The bytes freed, and the effects.
        """
        effects: list[Effect] = []
        freed = 0
        for segment in self.tiers.spare(needed, device):
            freed += self.segments.at(segment).nbytes
            effects += map(Released, self.segments.drop_host_copy(segment))
            self.tiers.forget([segment])
        return freed, effects

    def unpin(self, prefix: str) -> tuple[str, list[Effect]]:
        """Unpin a model; return its key. Raises as :meth:`Models.pin` does."""
        return self.models.pin(prefix, pinned=False), self.leave_devices()

    def in_lower_tier(self, key: str, device: str) -> bool:
        """Whether a committed model has blobs in host copies of a device alone, ``cpu`` or files."""
        if key not in self.committed or self.resident(key):
            return False
        segments = self.segments
        left = segments.elsewhere.intersection(self.segments_of(key))
        return any((segment in segments.filed) is (device == FILES) for segment in left)

    def _use(self, owner: str) -> Use:
        """Return how an owner of references needs a segment on its device."""
        model = self.models.get(owner)
        if model is None or model.state is not State.COMMITTED or model.pinned or model.awake:
            return Use.AWAKE
        return Use.AWAY if model.away else Use.IDLE

    # The sleep of clients of protocol 1, which read a host copy that is a model of its own.

    def asleep(self, keys: Iterable[str]) -> list[str]:
        """Return those of the models that have no readers while their host copies have some: all their readers sleep.

        Pinned models are not returned; nor is any during the grace period.
        """
        found = []
        for key in keys:
            model, committed = self.models.get(key), self.committed.get(key)
            if model is None or committed is None or model.readers or model.pinned or self.grace.active:
                continue
            copy = self.models.get(committed.host_key)
            if copy is not None and copy.readers:
                found.append(key)
        return found

    # Committed models.

    def remove(self, prefix: str) -> tuple[str, list[Effect]]:
        """Remove a committed model without readers; return its key. Raises as :meth:`Models.remove` does."""
        key, outcomes = self.models.remove(prefix)
        return key, self._apply(outcomes)

    def segments_of(self, key: str) -> tuple[int, ...]:
        """Return the ids of the segments that a committed model's blobs are in."""
        return tuple(dict.fromkeys(segment for segment, _ in self.locations_of(key)))

    def locations_of(self, key: str) -> tuple[tuple[int, int], ...]:
        """Return the location (segment id, first byte) of each blob of a committed model's manifest."""
        manifest = self.committed[key].manifest
        blobs = (self.segments.blobs.at(manifest.device, blob.digest) for blob in manifest.blobs)
        return tuple((blob.segment, blob.offset) for blob in blobs)

    def readmit(
        self,
        data: bytes,
        manifest: Manifest,
        locations: Sequence[tuple[int, int]],
        *,
        pinned: bool = False,
        last_used: float = 0.0,
    ) -> None:
        """Add a model that an earlier store had committed, in segments that this store took back."""
        self.models.returned(
            manifest.key,
            name=manifest.name,
            engine=manifest.engine,
            device=manifest.device,
            pinned=pinned,
            last_used=last_used,
        )
        self.segments.adopt(manifest.key, manifest.device, manifest.blobs, locations)
        self.committed[manifest.key] = Committed(data, manifest)

    def sweep(self, segments: Iterable[int] | None = None) -> list[Effect]:
        """Release those of the segments without references; None: of all segments."""
        return [*map(Released, self.segments.sweep(segments))]

    # Compaction and quarantine.

    def cancel(self, compaction: Compaction) -> list[Effect]:
        """End a compaction without moving blobs. Idempotent."""
        return [*map(Released, self.compactions.cancel(compaction)), *self.leave_devices()]

    def end_compaction(self, compaction: Compaction) -> tuple[int, int, list[Effect]]:
        """Move blobs to their verified copies; return bytes moved, bytes freed, and the effects."""
        done = self.compactions.end(compaction)
        if done.freed:
            self.counts.add("compactions")
        # The keeper must know the new locations before it releases the old segments.
        relocated = self._relocated(owner for owner in sorted(done.owners) if owner in self.committed)
        self.tiers.forget(done.released)
        effects = [*relocated, *(Released(segment) for segment in done.released), *self.leave_devices()]
        return done.moved, done.freed, effects

    def quarantine(self, segments: Iterable[int]) -> Quarantined:
        """Stop sharing segments that have wrong bytes on their device; the store verified what is in lower tiers.

        Models that have blobs there are withdrawn, and their readers keep their mappings. Publications that count on
        such blobs lose their plans.
        """
        present = tuple(segment for segment in sorted(set(segments)) if self._on_device(segment))
        owners = set[str]().union(*(self.segments.owners(segment) for segment in present))
        effects: list[Effect] = []
        for key in [key for key, plan in self.plans.items() if plan.token in owners]:
            effects += self.drop_plan(key)
        withdrawn = []
        for key in [key for key in self.committed if key in owners]:
            withdrawn.append(self.committed[key])
            effects += self.drop_plan(key)
            effects += self._apply(self.models.withdraw(key))
            effects += map(Released, self.tiers.let_go_all(key))
        effects += [Released(segment) for segment in self.segments.condemn(present)]
        for _ in present:
            self.counts.add("quarantines")
        return Quarantined(present, tuple(withdrawn), (*effects, *self.leave_devices()))

    def _on_device(self, segment: int) -> bool:
        return self.segments.has(segment) and self.segments.at(segment).residency is Residency.RESIDENT

    # Outcomes of the transition table.

    def _relocated(self, keys: Iterable[str]) -> list[Effect]:
        """Record that blobs of committed models have other locations."""
        effects: list[Effect] = []
        for key in keys:
            self.model_bytes.forget(key)
            effects.append(Relocated(key))
        return effects

    def _apply(self, outcomes: Iterable[Outcome]) -> list[Effect]:
        """Apply outcomes to the other parts of the state; return their effects."""
        effects: list[Effect] = []
        for outcome in outcomes:
            match outcome:
                case Dropped(key):
                    effects += self.drop_plan(key)
                    self.model_bytes.forget(key)
                    if self.committed.pop(key, None) is not None:
                        effects += [Forgotten(key), *self.drop(key)]
                    elif self.withdrawn.pop(key, None) is not None:
                        effects += self.drop(key)
                case Withdrawn(key, token):
                    self.model_bytes.forget(key)
                    self.withdrawn[token] = self.committed.pop(key)
                    effects.append(Forgotten(key))
                    self.segments.rename(key, token)
                case Unplanned(key):
                    effects += self.drop_plan(key)
                case _:
                    effects.append(outcome)
        return effects
