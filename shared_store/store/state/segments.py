"""Segments: which are allocated or promised, which blobs are in them, and which owners refer to them.

A blob has references of the models that name it: a committed model refers by its key, a model that is being published
by its publisher's token, from the moment at which a plan counts on the blob. A segment is released when none of its
blobs has a reference, none refers to it as a whole, and none writes it. Only committed blobs are shared: a publisher's
segment is its own until the commit, and a quarantined segment is shared with no new reader.

Where a segment's bytes are is its residency (:mod:`shared_store.store.state.residency`). Its host copy is a segment of
a lower tier without blobs, which the segment refers to, and which is released with it.

Methods that remove references return the ids of the segments that are released; the caller releases their memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared_store.base.manifest import Blob
from shared_store.store.state.blobs import BlobEntry, Blobs
from shared_store.store.state.owners import OwnerIndex
from shared_store.store.state.publish_plan import Draft, Location, PublishPlan
from shared_store.store.state.releases import Releases
from shared_store.store.state.residency import (
    FILES,
    HOST,
    ON_DEVICE,
    TRANSITIONS,
    Action,
    Event,
    Residency,
    resting_place,
)
from shared_store.store.state.segment_entry import OccupiedSegment, SegmentEntry, new_id


@dataclass(frozen=True)
class Shared:
    """The result of a commit: segments to release, and owners of blobs that have other locations now."""

    released: list[int]
    relocated: frozenset[str] = frozenset()


class Segments:
    """The segments of all devices, and the blobs in them. ``limits``: most bytes of segments by device."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = dict(limits)
        self.blobs = Blobs()
        self.releases = Releases()
        self._entries: dict[int, SegmentEntry] = {}
        self._owners = OwnerIndex[str, int]()  # of writers, and of references to whole segments
        self.elsewhere: set[int] = set()
        """Ids of the segments that are not resident."""
        self.copied: set[int] = set()
        """Ids of the segments that have host copies."""
        self.filed: set[int] = set()
        """Ids of those of them whose host copies are files."""

    # Questions.

    def has(self, segment: int) -> bool:
        """Whether there is a segment with this id."""
        return segment in self._entries

    def at(self, segment: int) -> SegmentEntry:
        """Return the segment with this id, which must exist."""
        return self._entries[segment]

    def all(self) -> list[SegmentEntry]:
        """Return every segment, including promised ones."""
        return list(self._entries.values())

    def on(self, device: str) -> list[SegmentEntry]:
        """Return the segments of a device, including promised ones."""
        return [entry for entry in self._entries.values() if entry.device == device]

    def devices(self) -> list[str]:
        """Return the devices that have segments."""
        return list(dict.fromkeys(entry.device for entry in self._entries.values()))

    def resident_bytes(self, device: str) -> int:
        """Return the bytes allocated on a device."""
        return sum(entry.nbytes for entry in self.on(device) if entry.allocated)

    def count(self, device: str) -> int:
        """Return the number of segments allocated on a device."""
        return sum(entry.allocated for entry in self.on(device))

    def used(self, device: str) -> int:
        """Return the bytes that count for the device's limit: allocated, promised, and released but not yet free."""
        entries = sum(entry.nbytes for entry in self.on(device) if entry.residency in ON_DEVICE)
        return entries + self.releases.nbytes(device)

    def missing(self, device: str, needed: int) -> int:
        """Return how many of ``needed`` bytes exceed the device's limit once released memory is free; 0 or less: none.

        An allocation waits for released memory, so nothing is evicted in its place.
        """
        limit = self.limits.get(device)
        return 0 if limit is None else self.used(device) - self.releases.nbytes(device) + needed - limit

    def over_limit(self, device: str) -> bool:
        """Whether the device's limit is exceeded until released memory is free."""
        limit = self.limits.get(device)
        return limit is not None and self.used(device) > limit

    def host_bytes(self, device: str) -> int:
        """Return the bytes of host copies of a device's segments that are in host memory."""
        entries = (self._entries[segment] for segment in self.copied - self.filed)
        return sum(entry.nbytes for entry in entries if entry.device == device)

    def disk_bytes(self, device: str) -> int:
        """Return the bytes of host copies of a device's segments that are files."""
        entries = (self._entries[segment] for segment in self.filed)
        return sum(entry.nbytes for entry in entries if entry.device == device)

    def copied_bytes(self, device: str = HOST) -> int:
        """Return the bytes of host copies on a device, promised ones excepted."""
        return sum(entry.nbytes for entry in self.on(device) if entry.host_of is not None)

    def unused(self, device: str) -> tuple[int, int]:
        """Return the dead bytes and the padding bytes of a device's settled segments."""
        dead = padding = 0
        for entry in self.on(device):
            if entry.settled and not entry.quarantined and entry.host_of is None:
                dead += entry.placed - entry.live
                padding += entry.nbytes - entry.placed
        return dead, padding

    def quarantined(self) -> list[SegmentEntry]:
        """Return the segments that remain only for the readers that map them."""
        return [entry for entry in self._entries.values() if entry.quarantined]

    def owners(self, segment: int) -> set[str]:
        """Return the owners of references to a segment or to a blob in it."""
        entry = self._entries[segment]
        return entry.references | self.blobs.owners_in(segment)

    def occupied(self, device: str) -> list[OccupiedSegment]:
        """Return a device's settled segments with their owners; a host copy has the owners of what it is a copy of."""
        return [
            OccupiedSegment(entry.nbytes, frozenset(self.owners(entry.host_of or entry.id)))
            for entry in self.on(device)
            if entry.settled
        ]

    def contents(self, segment: int) -> list[tuple[Blob, int]]:
        """Return a segment's live blobs and their first bytes, in that order."""
        entry = self._entries[segment]
        present = self.blobs.present(entry.device, entry.blobs)
        blobs = [(Blob(digest, blob.nbytes), blob.offset) for digest, blob in present.items()]
        return sorted(blobs, key=lambda found: (found[1], found[0].nbytes, found[0].digest))

    def whole_references(self) -> dict[str, frozenset[int]]:
        """Return the index of writers and of references to whole segments by owner, for tests."""
        return self._owners.all()

    # A publication.

    def refer_known(self, draft: Draft) -> None:
        """Add references of a plan to its blobs that are committed, so that they stay while memory is freed for it."""
        for digest in self.blobs.present(draft.device, (blob.digest for blob in draft.blobs)):
            self.blobs.refer(draft.device, digest, draft.token)

    def promise_plan(self, draft: Draft) -> PublishPlan:
        """Promise the segments of a draft whose known blobs have references of its token.

        Promised segments count for the limit. They are allocated one at a time, when the publisher is ready to fill
        them, so that it can free originals in between.
        """
        ids = [self.promise(draft.device, nbytes, draft.token) for nbytes in draft.layout.sizes]
        fresh = dict(zip(draft.sizes, draft.layout.placements, strict=True))
        for digest, spot in fresh.items():
            self._entries[ids[spot.segment]].placed += draft.sizes[digest]
        returning = tuple(draft.elsewhere.segments)
        for segment in returning:
            self.step(segment, Event.RETURN)
            self._entries[segment].writer = draft.token
            self._owners.add(draft.token, segment)
        unwritten = draft.sizes.keys() | draft.elsewhere.places.keys()
        locations: list[Location] = []
        for blob in draft.blobs:
            if blob.digest in fresh:
                spot = fresh[blob.digest]
                found = (ids[spot.segment], spot.offset)
            else:
                entry = self.blobs.at(draft.device, blob.digest)
                found = (entry.segment, entry.offset)
            locations.append(Location(*found, new=blob.digest in unwritten))
            unwritten.discard(blob.digest)  # the publisher writes it once
        return PublishPlan(
            draft.token, draft.blobs, tuple(locations), (*ids, *returning), returning, draft.elsewhere.rest
        )

    def promise(self, device: str, nbytes: int, writer: str) -> int:
        """Promise a segment to a writer; return its id."""
        segment = new_id()
        self._entries[segment] = SegmentEntry(segment, device, nbytes, writer)
        self._owners.add(writer, segment)
        return segment

    def move_promise(self, segment: int, device: str) -> None:
        """Promise a segment that is not allocated, and has no blobs, on another device."""
        self._entries[segment].device = device

    def fill(self, segment: int) -> None:
        """Record that a promised segment is allocated."""
        self._entries[segment].allocated = True

    def filled(self, plan: PublishPlan) -> bool:
        """Whether all segments of a plan are allocated."""
        return all(self._entries[segment].allocated for segment in plan.segments)

    def commit(self, key: str, plan: PublishPlan) -> Shared:
        """Share the blobs of a plan. If another model committed an equal blob meanwhile, both use that copy.

        A blob that is not on its device gets the plan's location.
        """
        for segment in plan.returning:
            self.step(segment, Event.FILLED)
        touched, relocated = set(plan.segments), set[str]()
        for blob, location in zip(plan.blobs, plan.locations, strict=True):
            entry = self._entries[location.segment]
            found = self.blobs.get(entry.device, blob.digest)
            if found is None:
                self._place(entry, blob, location.offset)
            elif location.new and found.segment in self.elsewhere:
                touched.add(found.segment)
                relocated |= found.references
                self.move(blob.digest, location.segment, location.offset)
            self.blobs.replace(entry.device, blob.digest, plan.token, key)
        for segment in plan.segments:
            self.end_writing(segment)
        return Shared(self._sweep(touched), frozenset(relocated - {plan.token, key}))

    def end_writing(self, segment: int) -> None:
        """Record that a segment's contents are committed."""
        entry = self._entries[segment]
        if entry.writer is not None:
            self._owners.discard(entry.writer, segment)
            entry.writer = None

    # Tiers.

    def step(self, segment: int, event: Event) -> Action:
        """Apply an event to a segment's residency; return the work that it requires."""
        entry = self._entries[segment]
        entry.residency, action = TRANSITIONS[entry.residency, event]
        if entry.residency is Residency.RESIDENT:
            self.elsewhere.discard(segment)
        else:
            self.elsewhere.add(segment)
        return action

    def released(self, segment: int) -> bool:
        """Record that a leaving segment's device memory is released. False: there is no such segment any more."""
        entry = self._entries.get(segment)
        if entry is None or entry.residency is not Residency.LEAVING:
            return False
        self.step(segment, Event.FILED if segment in self.filed else Event.RELEASED)
        entry.allocated = False
        return True

    def fail_returning(self, owner: str) -> list[int]:
        """End the returns of segments that an owner was filling; return their ids, to release their device memory."""
        failed = [
            segment
            for segment in self._owners.of(owner)
            if self._entries[segment].writer == owner and self._entries[segment].residency is Residency.RETURNING
        ]
        for segment in failed:
            self.end_writing(segment)
            self.step(segment, Event.FAILED)
        return failed

    def add_host_copy(self, segment: int, host: int) -> None:
        """Make an allocated segment of a lower tier the host copy of a segment that has none."""
        copy, entry = self._entries[host], self._entries[segment]
        self.end_writing(host)
        copy.host_of, entry.host = segment, host
        self.copied.add(segment)
        if copy.device == FILES:
            self.filed.add(segment)
        self.refer(host, _host_owner(segment))

    def drop_host_copy(self, segment: int) -> list[int]:
        """Remove the host copy of a resident segment."""
        entry = self._entries[segment]
        entry.host = None
        self._forget_copy(segment)
        return self.drop(_host_owner(segment))

    def _forget_copy(self, segment: int) -> None:
        self.copied.discard(segment)
        self.filed.discard(segment)

    # A store before this one.

    def take_back(self, segment: int, device: str, nbytes: int) -> None:
        """Add a segment that a store before this one allocated. :meth:`adopt` adds its blobs."""
        self._entries[segment] = SegmentEntry(segment, device, nbytes, writer=None, allocated=True)

    def take_back_elsewhere(self, segment: int, device: str, nbytes: int, host_device: str) -> None:
        """Add a segment of which a store before this one had the host copy alone, on ``host_device``.

        :meth:`add_host_copy` must follow.
        """
        residency = resting_place(host_device)
        self._entries[segment] = SegmentEntry(segment, device, nbytes, writer=None, residency=residency)
        self.elsewhere.add(segment)

    def offered(self, segment: int) -> None:
        """Record that a client gave back the device memory of a segment in a lower tier."""
        self.step(segment, Event.OFFERED)
        self._entries[segment].allocated = True

    def adopt(self, key: str, device: str, blobs: Sequence[Blob], locations: Sequence[tuple[int, int]]) -> None:
        """Add the blobs of a model that an earlier store committed, at locations (segment id, first byte).

        Where another model has an equal blob elsewhere, that copy is used by both.
        """
        for blob, (segment, offset) in zip(blobs, locations, strict=True):
            if self.blobs.get(device, blob.digest) is None:
                entry = self._entries[segment]
                self._place(entry, blob, offset)
                entry.placed += blob.nbytes  # earlier dead bytes count as padding from here on
            self.blobs.refer(device, blob.digest, key)

    # References end.

    def refer(self, segment: int, owner: str) -> None:
        """Add a reference to a segment as a whole."""
        self._entries[segment].references.add(owner)
        self._owners.add(owner, segment)

    def drop(self, owner: str) -> list[int]:
        """Remove an owner: its references to blobs and segments, and the segments that it was writing."""
        touched: set[int] = set()
        for segment in self._owners.of(owner):
            entry = self._entries[segment]
            entry.references.discard(owner)
            entry.writer = None if entry.writer == owner else entry.writer
            self._owners.discard(owner, segment)
            touched.add(segment)
        for digest, blob in self.blobs.drop(owner):
            self._remove(digest, blob)
            touched.add(blob.segment)
        return self._sweep(touched)

    def rename(self, owner: str, other: str) -> None:
        """Turn all references of a committed model, which are to blobs alone, into those of another name."""
        self.blobs.rename(owner, other)

    def move(self, digest: bytes, segment: int, offset: int) -> BlobEntry:
        """Give a committed blob another location, in a segment of the same device."""
        target = self._entries[segment]
        blob = self.blobs.at(target.device, digest)
        self._remove(digest, blob)
        target.blobs.add(digest)
        target.live += blob.nbytes
        self.blobs.relocate(blob, segment, offset)
        return blob

    def condemn(self, segments: Iterable[int]) -> list[int]:
        """Quarantine segments: their blobs are shared no more, and the blobs' owners refer to the segments instead."""
        present = [segment for segment in segments if segment in self._entries]
        for segment in present:
            entry = self._entries[segment]
            for owner in self.owners(segment):
                self.refer(segment, owner)
            entry.quarantined = True
            for digest in entry.blobs:
                self.blobs.condemn(entry.device, digest)
            entry.blobs.clear()
            entry.live = 0
        return self._sweep(present)

    def sweep(self, segments: Iterable[int] | None = None) -> list[int]:
        """Remove those of the segments without references; None: of all segments."""
        return self._sweep(self._entries if segments is None else segments)

    def _place(self, entry: SegmentEntry, blob: Blob, offset: int) -> None:
        self.blobs.add(entry.device, blob.digest, BlobEntry(blob.nbytes, entry.id, offset))
        entry.blobs.add(blob.digest)
        entry.live += blob.nbytes

    def _remove(self, digest: bytes, blob: BlobEntry) -> None:
        entry = self._entries[blob.segment]
        entry.blobs.discard(digest)
        entry.live -= blob.nbytes

    def _sweep(self, segments: Iterable[int]) -> list[int]:
        released = []
        for segment in list(segments):
            entry = self._entries.get(segment)
            if entry is not None and not entry.blobs and not entry.references and entry.writer is None:
                del self._entries[segment]
                self.elsewhere.discard(segment)
                self._forget_copy(segment)
                released.append(segment)
                if entry.host is not None:
                    released += self.drop(_host_owner(segment))
        return released


def _host_owner(segment: int) -> str:
    """Return the owner of the reference to a segment's host copy."""
    return f"segment {segment}"
