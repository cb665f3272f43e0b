"""Segments and the blobs in them: what is allocated, where each digest lies, and which models hold on to it.

A blob is held by the models that name it: a committed one by its key, one that is being published by its publisher's
token, from the moment a plan counts on the blob. A segment is released when no blob in it is held any more, and nobody
keeps it as a whole. Only committed blobs are shared: what a publisher is still writing is nobody else's, and what lies
in a quarantined segment is nobody else's any more.

A segment's id is a random number of 53 bits (exact in every JSON reader): no other segment has it, also not of a store
that ran before this one or after it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shared_store.base.errors import ProtocolError, UnknownDeviceError
from shared_store.base.layout import Layout, pack, restrict
from shared_store.base.manifest import Blob
from shared_store.memory import Backend, FdSegment
from shared_store.memory.backend import Segment
from shared_store.store.space.compaction_plan import CompactionPlan, Source
from shared_store.store.space.eviction import OccupiedSegment
from shared_store.store.state.digest_check import Check, Part


@dataclass
class HeldSegment:
    """A segment that the store holds, or has promised.

    Attributes:
        writer: token of who fills it: a publisher, or a compaction.
        memory: None until its writer is ready to fill it.
        blobs: digests of the live blobs in it; ``live``: their bytes.
        placed: bytes of the blobs that were ever put there; what is more is padding, what of it is not live is dead.
        keepers: who keeps it as a whole: compactions that read it; when it is quarantined, those who map it.
        quarantined: it has bytes that are wrong; none of its blobs is shared any more.
    """

    id: int
    device: str
    nbytes: int
    writer: str | None
    memory: Segment | None = None
    blobs: set[bytes] = field(default_factory=set)
    live: int = 0
    placed: int = 0
    keepers: set[str] = field(default_factory=set)
    quarantined: bool = False

    @property
    def settled(self) -> bool:
        """Whether it is allocated, and what is in it was committed."""
        return self.memory is not None and self.writer is None


@dataclass
class HeldBlob:
    """A committed blob: where it lies, and who holds it."""

    nbytes: int
    segment: int
    offset: int
    holders: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Place:
    """Where a blob of a plan lies (segment by its id); ``new``: its publisher must write it."""

    segment: int
    offset: int
    new: bool


@dataclass
class PublishPlan:
    """What a publisher was told: a place for each blob, and the segments that are promised to it."""

    token: str
    blobs: tuple[Blob, ...]
    places: tuple[Place, ...]
    segments: tuple[int, ...]


def new_id() -> int:
    """An id for a segment; see the module."""
    return 1 + secrets.randbelow((1 << 53) - 1)


class Segments:
    """The memory of all devices of a store."""

    def __init__(self, backends: Mapping[str, Backend], limits: Mapping[str, int]) -> None:
        self.backends = dict(backends)
        self.limits = dict(limits)
        self._segments: dict[int, HeldSegment] = {}
        self._blobs: dict[tuple[str, bytes], HeldBlob] = {}
        self.released: Callable[[int], None] = lambda _: None
        """Told the id of each segment that is held no more."""

    def add_device(self, backend: Backend) -> None:
        """Take in a device that a client asked for first."""
        self.backends.setdefault(backend.device, backend)

    def backend(self, device: str) -> Backend:
        """The device's backend. Raises :class:`UnknownDeviceError` that lists the devices."""
        try:
            return self.backends[device]
        except KeyError:
            known = ", ".join(sorted(self.backends))
            raise UnknownDeviceError(f"this store has no device {device!r}; it has: {known}") from None

    def has(self, segment: int) -> bool:
        """Whether there is a segment with this id."""
        return segment in self._segments

    def segment(self, segment: int) -> HeldSegment:
        """The segment with this id."""
        return self._segments[segment]

    def blob(self, device: str, digest: bytes) -> HeldBlob:
        """The committed blob with this digest."""
        return self._blobs[device, digest]

    def held_by(self, device: str, digests: Iterable[bytes]) -> dict[bytes, HeldBlob]:
        """Those of the digests that are committed on the device."""
        return {digest: blob for digest in digests if (blob := self._blobs.get((device, digest)))}

    def all(self) -> list[HeldSegment]:
        """Every segment, promised ones too."""
        return list(self._segments.values())

    def export(self, segment: int) -> int:
        """A new fd of an allocated segment; the caller's."""
        held = self._segments[segment]
        assert held.memory is not None  # noqa: S101 - promised segments have no fd yet
        if isinstance(held.memory, FdSegment):  # its device's driver may not have started
            return held.memory.export().detach()
        return self.backend(held.device).export(held.memory).detach()

    def take_back(self, segment: int, device: str, memory: FdSegment) -> None:
        """Hold a segment that a store before this one allocated. :meth:`adopt` says what is in it."""
        self._segments[segment] = HeldSegment(segment, device, memory.nbytes, writer=None, memory=memory)

    def adopt(self, key: str, device: str, blobs: Sequence[Blob], places: Sequence[tuple[int, int]]) -> None:
        """Have a model that was committed before hold its blobs, at places (segment id, first byte) in held segments.

        Where another model has a blob elsewhere, that copy counts for both.
        """
        for blob, (segment, offset) in zip(blobs, places, strict=True):
            known = self._blobs.get((device, blob.digest))
            if known is None:
                known = self._blobs[device, blob.digest] = HeldBlob(blob.nbytes, segment, offset)
                held = self._segments[segment]
                held.blobs.add(blob.digest)
                held.live += blob.nbytes
                held.placed += blob.nbytes  # what was there and is dead counts as padding now
            known.holders.add(key)

    def sweep(self) -> None:
        """Release every segment in which nothing is held."""
        self._sweep(self._segments)

    def devices(self) -> list[str]:
        """Devices that are known, and those that only segments name."""
        return list(dict.fromkeys([*self.backends, *(held.device for held in self._segments.values())]))

    def resident_bytes(self, device: str) -> int:
        """Bytes allocated on a device."""
        return sum(held.nbytes for held in self._segments.values() if held.device == device and held.memory)

    def count(self, device: str) -> int:
        """Segments that are allocated on a device."""
        return sum(held.device == device and held.memory is not None for held in self._segments.values())

    def used(self, device: str) -> int:
        """Bytes that count for the device's limit: allocated and promised."""
        return sum(held.nbytes for held in self._segments.values() if held.device == device)

    def unused(self, device: str) -> tuple[int, int]:
        """Bytes of a device's settled segments that no blob uses: dead ones, where there was one, and padding."""
        dead = padding = 0
        for held in self._segments.values():
            if held.device == device and held.settled and not held.quarantined:
                dead += held.placed - held.live
                padding += held.nbytes - held.placed
        return dead, padding

    def quarantined(self) -> list[HeldSegment]:
        """Segments that are kept only for those who map them."""
        return [held for held in self._segments.values() if held.quarantined]

    def holders(self, segment: int) -> set[str]:
        """Who keeps a segment, or a blob in it."""
        held = self._segments[segment]
        return held.keepers.union(*(self._blobs[held.device, digest].holders for digest in held.blobs))

    def occupied(self, device: str) -> list[OccupiedSegment]:
        """A device's settled segments, and who must go before each is freed."""
        return [
            OccupiedSegment(held.nbytes, frozenset(self.holders(held.id)))
            for held in self._segments.values()
            if held.device == device and held.settled
        ]

    def needed(self, device: str, blobs: Sequence[Blob], wish: Layout | None = None) -> int:
        """Bytes of the segments that a plan for these blobs would take. Raises as :meth:`plan` does."""
        return sum(self._lay_out(device, blobs, wish)[1].sizes)

    def _lay_out(self, device: str, blobs: Sequence[Blob], wish: Layout | None) -> tuple[dict[bytes, int], Layout]:
        """Sizes by digest of the blobs that are not here, and a layout for them."""
        sizes: dict[bytes, int] = {}
        new: list[int] = []
        for index, blob in enumerate(blobs):
            here = self._blobs.get((device, blob.digest))
            if here is None and blob.digest not in sizes:
                new.append(index)
            expected = here.nbytes if here else sizes.setdefault(blob.digest, blob.nbytes)
            if expected != blob.nbytes:
                raise ProtocolError(f"blob {blob.digest.hex()[:16]} has {expected} bytes, not {blob.nbytes}")
        if wish is None:
            return sizes, pack(list(sizes.values()))
        try:
            return sizes, restrict(wish, [blob.nbytes for blob in blobs], new)
        except ValueError as error:
            raise ProtocolError(f"a plan with a wish that cannot be granted: {error}") from error

    def plan(
        self,
        device: str,
        token: str,
        blobs: Sequence[Blob],
        make_room: Callable[[int], None] = lambda _: None,
        wish: Layout | None = None,
    ) -> PublishPlan:
        """Say where each blob of a publisher goes: blobs that are here already stay, the others get new segments.

        The new segments are promised (and count for the limit), but not allocated: that happens one at a time, when
        the publisher is ready to fill them, so that it can free originals in between.

        ``make_room`` is called with the bytes that they take. It may drop models, whose blobs stay here if the plan
        counts on them, and it raises what there is to raise when there is no room. ``wish``: see :func:`restrict`.

        Raises:
            ProtocolError: a digest comes with another size than the store knows for it, or a wish makes no sense.
        """
        sizes, layout = self._lay_out(device, blobs, wish)
        for known in self.held_by(device, (blob.digest for blob in blobs)).values():
            known.holders.add(token)
        try:
            make_room(sum(layout.sizes))
        except BaseException:
            self.drop(token)
            raise
        ids = [self._promise(device, nbytes, token) for nbytes in layout.sizes]
        fresh = dict(zip(sizes, layout.placements, strict=True))
        for digest, spot in fresh.items():
            self._segments[ids[spot.segment]].placed += sizes[digest]
        places: list[Place] = []
        for blob in blobs:
            here = self._blobs.get((device, blob.digest))
            if here is not None:
                places.append(Place(here.segment, here.offset, new=False))
            else:
                spot = fresh[blob.digest]
                places.append(Place(ids[spot.segment], spot.offset, new=blob.digest in sizes))
                sizes.pop(blob.digest, None)  # the publisher writes it once
        return PublishPlan(token, tuple(blobs), tuple(places), tuple(ids))

    def fill(self, segment: int, memory: Segment) -> None:
        """Take in the memory that was allocated for a promised segment."""
        self._segments[segment].memory = memory

    def complete(self, plan: PublishPlan) -> bool:
        """Whether all of a plan's segments are allocated."""
        return all(self._segments[segment].memory is not None for segment in plan.segments)

    def seal(self, segments: Iterable[int]) -> None:
        """Make what was written immutable. Raises :class:`MemoryBackendError` while it is mapped for writing."""
        for segment in segments:
            held = self._segments[segment]
            if held.memory is not None:
                self.backend(held.device).seal(held.memory)

    def check(self, plan: PublishPlan) -> Check:
        """What digests the bytes that were written, where the host can read them. Call it after :meth:`seal`."""
        placed = list(zip(plan.blobs, plan.places, strict=True))
        return Check(
            part
            for segment in plan.segments
            for part in self._part(
                segment, [(blob, at.offset) for blob, at in placed if at.new and at.segment == segment]
            )
        )

    def recheck(self, device: str, digests: Iterable[bytes]) -> Check:
        """What digests committed blobs again. The host must be able to read the device."""
        found: dict[int, list[tuple[Blob, int]]] = {}
        for digest, held in self.held_by(device, digests).items():
            found.setdefault(held.segment, []).append((Blob(digest, held.nbytes), held.offset))
        return Check(part for segment, blobs in found.items() for part in self._part(segment, blobs))

    def _part(self, segment: int, blobs: Sequence[tuple[Blob, int]]) -> list[Part]:
        held = self._segments[segment]
        backend = self.backend(held.device)
        if held.memory is None or not backend.host_readable:
            return []  # where the host cannot read, who wrote it digests its copy where it lies
        return [(backend, held.memory, blobs)]

    def commit(self, key: str, plan: PublishPlan) -> None:
        """Make the plan's blobs shared. Where another model brought a blob meanwhile, that copy counts for both."""
        for blob, place in zip(plan.blobs, plan.places, strict=True):
            device = self._segments[place.segment].device
            known = self._blobs.get((device, blob.digest))
            if known is None:
                known = self._blobs[device, blob.digest] = HeldBlob(blob.nbytes, place.segment, place.offset)
                self._segments[place.segment].blobs.add(blob.digest)
                self._segments[place.segment].live += blob.nbytes
            known.holders.discard(plan.token)
            known.holders.add(key)
        for segment in plan.segments:
            self._segments[segment].writer = None
        self._sweep(plan.segments)

    def drop(self, holder: str) -> None:
        """Forget a key or a token: blobs that only it held, and segments that it was writing or kept."""
        touched: set[int] = set()
        for segment, held in self._segments.items():
            if held.writer == holder or holder in held.keepers:
                touched.add(segment)
                held.keepers.discard(holder)
                held.writer = None if held.writer == holder else held.writer
        for (device, digest), blob in list(self._blobs.items()):
            if holder in blob.holders:
                blob.holders.discard(holder)
                if not blob.holders:
                    del self._blobs[device, digest]
                    self._segments[blob.segment].blobs.discard(digest)
                    self._segments[blob.segment].live -= blob.nbytes
                    touched.add(blob.segment)
        self._sweep(touched)

    def rename(self, holder: str, token: str) -> None:
        """What one held is held by another name."""
        for names in (
            *(blob.holders for blob in self._blobs.values()),
            *(one.keepers for one in self._segments.values()),
        ):
            if holder in names:
                names.discard(holder)
                names.add(token)

    # Compaction: blobs move to a new segment.

    def sources(self, device: str, unmapped: Callable[[str], bool], share: float = 0.0) -> list[Source]:
        """Segments of a device that may be emptied: all who hold something there are ``unmapped``.

        ``share`` of a segment's bytes must be unused.
        """
        return [
            Source(held.id, held.nbytes, tuple(self._contents(held)))
            for held in self._segments.values()
            if held.device == device
            and held.settled
            and held.blobs
            and held.nbytes - held.live >= share * held.nbytes
            and all(map(unmapped, self.holders(held.id)))
        ]

    def begin_compaction(self, device: str, token: str, plan: CompactionPlan) -> int:
        """Promise the new segment, and keep the old ones until the token is dropped; returns the new one's id."""
        for segment in plan.sources:
            self._segments[segment].keepers.add(token)
        return self._promise(device, plan.nbytes, token)

    def check_moves(self, segment: int, plan: CompactionPlan) -> Check:
        """What digests a compaction's copies, where the host can read them. Call it once they are sealed."""
        return Check(self._part(segment, [(move.blob, move.offset) for move in plan.moves]))

    def end_compaction(
        self,
        segment: int,
        plan: CompactionPlan,
        unmapped: Callable[[str], bool],
        moved: Callable[[set[str]], None] = lambda _: None,
    ) -> tuple[int, int]:
        """Put blobs where their checked copies are, and let go of what that empties; returns bytes moved and freed.

        ``moved`` is told whose blobs moved, before the old segments are let go.

        Meanwhile blobs may have gone, and segments may have got a reader or been quarantined: those stay as they are.
        When too few are left for a gain, nothing moves.
        """
        new = self._segments[segment]
        token = new.writer or ""
        still = {
            source
            for source in plan.sources
            if all(unmapped(holder) for holder in self.holders(source) - {token}) and self._segments[source].blobs
        }
        freed = sum(self._segments[source].nbytes for source in still) - new.nbytes
        moves = [
            move
            for move in plan.moves
            if move.source in still and move.blob.digest in self._segments[move.source].blobs
        ]
        if freed <= 0:
            self.drop(token)
            return 0, 0
        for move in moves:
            blob = self._blobs[new.device, move.blob.digest]
            old = self._segments[blob.segment]
            old.blobs.discard(move.blob.digest)
            old.live -= blob.nbytes
            new.blobs.add(move.blob.digest)
            new.live += blob.nbytes
            blob.segment, blob.offset = segment, move.offset
        new.writer = None
        new.placed = new.live
        moved(set().union(*(self._blobs[new.device, move.blob.digest].holders for move in moves)))
        self.drop(token)
        return new.live, freed

    def _contents(self, held: HeldSegment) -> list[tuple[Blob, int]]:
        """A segment's live blobs by their first bytes."""
        blobs = [
            (Blob(digest, blob.nbytes), blob.offset) for digest, blob in self.held_by(held.device, held.blobs).items()
        ]
        return sorted(blobs, key=lambda found: (found[1], found[0].nbytes, found[0].digest))

    # Quarantine: what is wrong is shared with nobody new.

    def condemn(self, segments: Iterable[int]) -> None:
        """Stop sharing what lies in segments; who holds something there keeps the segment instead."""
        present = [segment for segment in segments if segment in self._segments]
        for segment in present:
            held = self._segments[segment]
            held.keepers = self.holders(segment)
            held.quarantined = True
            for digest in held.blobs:
                del self._blobs[held.device, digest]
            held.blobs.clear()
            held.live = 0
        self._sweep(present)

    def close(self) -> None:
        """Release everything."""
        for held in self._segments.values():
            self._release(held)
        self._segments.clear()
        self._blobs.clear()

    def _sweep(self, segments: Iterable[int]) -> None:
        for segment in list(segments):
            held = self._segments.get(segment)
            if held is not None and not held.blobs and not held.keepers and held.writer is None:
                self._release(held)
                del self._segments[segment]
                self.released(segment)

    def _release(self, held: HeldSegment) -> None:
        if isinstance(held.memory, FdSegment):
            held.memory.release()
        elif held.memory is not None:
            self.backend(held.device).release(held.memory)

    def _promise(self, device: str, nbytes: int, writer: str) -> int:
        segment = new_id()
        self._segments[segment] = HeldSegment(segment, device, nbytes, writer)
        return segment
