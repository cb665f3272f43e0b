"""The whole state of a store, and the rules that concern several parts of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared_store.base.layout import Layout
from shared_store.base.manifest import Blob, Manifest
from shared_store.store.state.clients import Client
from shared_store.store.state.committed import Committed
from shared_store.store.state.compactions import Compaction, Compactions
from shared_store.store.state.counts import Counts
from shared_store.store.state.effects import Effect, Forgotten, Released, Relocated
from shared_store.store.state.files import FileDigests
from shared_store.store.state.grace import Grace
from shared_store.store.state.models import Asker, Dropped, Models, Outcome, Withdrawn
from shared_store.store.state.publish_plan import Draft, PublishPlan, draft
from shared_store.store.state.segments import Segments
from shared_store.store.state.turns import Turns


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
    ) -> None:
        """Begin empty.

        Args:
            limits: most bytes of segments by device; no entry: no limit.
            clock: returns Unix seconds.
            monotonic: returns monotonic seconds.
        """
        self.segments = Segments(limits)
        self.models = Models(clock)
        self.compactions = Compactions(self.segments, self.models.unread)
        self.turns = Turns()
        self.grace = Grace(monotonic)
        self.files = FileDigests()
        self.counts = Counts()
        self.clients: dict[int, Client] = {}
        self.committed: dict[str, Committed] = {}
        self.withdrawn: dict[str, Committed] = {}  # by the tokens of `models`
        self.plans: dict[str, PublishPlan] = {}

    # Publications.

    def draft(self, key: str, client: int, blobs: Sequence[Blob], preferred: Layout | None) -> Draft:
        """Lay out a publisher's new blobs; the state does not change. Raises as :func:`draft` does."""
        device = self.models.publishing(key, client).device
        return draft(self.segments.blobs, device, f"{key}/{client}", blobs, preferred)

    def drop_plan(self, key: str) -> list[Effect]:
        """Drop the plan of a publication, if it has one, and its promised segments."""
        plan = self.plans.pop(key, None)
        return [] if plan is None else self.drop(plan.token)

    def drop(self, owner: str) -> list[Effect]:
        """Remove all references of an owner."""
        return [Released(segment) for segment in self.segments.drop(owner)]

    def commit(self, key: str, client: int, committed: Committed) -> list[Effect]:
        """Make a model visible whose bytes were verified. The publisher and all waiters read it."""
        outcomes = self.models.commit(key, client)
        plan = self.plans.pop(key)
        released = self.segments.commit(key, plan)
        self.committed[key] = committed
        self.counts.add("publishes")
        return [*self._apply(outcomes), *(Released(segment) for segment in released)]

    def abort(self, key: str, client: int) -> list[Effect]:
        """End a publication without a commit."""
        outcomes = self.models.abort(key, client)
        self.counts.add("aborted_publishes")
        return self._apply(outcomes)

    # Readers.

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

    def leave(self, client: Client, key: str) -> list[Effect]:
        """Remove a client from the readers, waiters or publishers of a model."""
        client.private_bytes.pop(key, None)
        return self._apply(self.models.leave(key, client.number))

    def lost(self, client: Client) -> list[Effect]:
        """Remove a client from everything, because its connection ended."""
        self.clients.pop(client.number, None)
        for model in self.models.of(client.number):
            if model.publisher == client.number:
                self.counts.add("aborted_publishes")
        effects: list[Effect] = [*self.turns.lost(client.number)]
        effects += self._apply(self.models.lost(client.number))
        for compaction in self.compactions.by(client.number):
            effects += self.cancel(compaction)
        return effects

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

    def sweep(self) -> list[Effect]:
        """Release every segment without references."""
        return [Released(segment) for segment in self.segments.sweep()]

    # Compaction and quarantine.

    def cancel(self, compaction: Compaction) -> list[Effect]:
        """End a compaction without moving blobs. Idempotent."""
        return [Released(segment) for segment in self.compactions.cancel(compaction)]

    def end_compaction(self, compaction: Compaction) -> tuple[int, int, list[Effect]]:
        """Move blobs to their verified copies; return bytes moved, bytes freed, and the effects."""
        done = self.compactions.end(compaction)
        if done.freed:
            self.counts.add("compactions")
        # The keeper must know the new locations before it releases the old segments.
        relocated = [Relocated(owner) for owner in sorted(done.owners) if owner in self.committed]
        return done.moved, done.freed, [*relocated, *(Released(segment) for segment in done.released)]

    def quarantine(self, segments: Iterable[int]) -> Quarantined:
        """Stop sharing segments that have wrong bytes.

        Models that have blobs there are withdrawn, and their readers keep their mappings. Publications that count on
        such blobs lose their plans.
        """
        present = tuple(segment for segment in sorted(set(segments)) if self.segments.has(segment))
        owners = set[str]().union(*(self.segments.owners(segment) for segment in present))
        effects: list[Effect] = []
        for key in [key for key, plan in self.plans.items() if plan.token in owners]:
            effects += self.drop_plan(key)
        withdrawn = []
        for key in [key for key in self.committed if key in owners]:
            withdrawn.append(self.committed[key])
            effects += self._apply(self.models.withdraw(key))
        effects += [Released(segment) for segment in self.segments.condemn(present)]
        for _ in present:
            self.counts.add("quarantines")
        return Quarantined(present, tuple(withdrawn), tuple(effects))

    # Outcomes of the transition table.

    def _apply(self, outcomes: Iterable[Outcome]) -> list[Effect]:
        """Apply outcomes to the other parts of the state; return their effects."""
        effects: list[Effect] = []
        for outcome in outcomes:
            match outcome:
                case Dropped(key):
                    effects += self.drop_plan(key)
                    if self.committed.pop(key, None) is not None:
                        effects += [Forgotten(key), *self.drop(key)]
                    elif self.withdrawn.pop(key, None) is not None:
                        effects += self.drop(key)
                case Withdrawn(key, token):
                    self.withdrawn[token] = self.committed.pop(key)
                    effects.append(Forgotten(key))
                    self.segments.rename(key, token)
                case _:
                    effects.append(outcome)
        return effects
