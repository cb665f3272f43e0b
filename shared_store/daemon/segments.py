"""Segments and the blobs in them: what is allocated, where each digest lies, and which models hold on to it.

A blob is held by the models that name it: a committed one by its key, one that is being published by its publisher's
token, from the moment a plan counts on the blob. A segment is released when no blob in it is held any more. Only
committed blobs are shared: what a publisher is still writing is nobody else's.

A segment's id is a random number of 53 bits (exact in every JSON reader): no other segment has it, also not of a store
that ran before this one or after it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shared_store.digest import digest_at
from shared_store.errors import DigestMismatchError, OutOfMemoryError, ProtocolError, UnknownDeviceError
from shared_store.layout import pack
from shared_store.manifest import Blob
from shared_store.memory import Access, Backend, KeptSegment
from shared_store.memory import Mapping as MemoryMapping
from shared_store.memory.backend import Segment


@dataclass
class HeldSegment:
    """A segment that the store holds, or has promised.

    ``memory``: None until its publisher is ready to fill it; ``writer``: token of that publisher; ``blobs``: digests of
    the live blobs in it.
    """

    id: int
    device: str
    nbytes: int
    writer: str | None
    memory: Segment | None = None
    blobs: set[bytes] = field(default_factory=set)


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

    def has(self, segment: int) -> bool:
        """Whether this segment is held or promised."""
        return segment in self._segments

    def export(self, segment: int) -> int:
        """A new fd of an allocated segment; the caller's."""
        held = self._segments[segment]
        assert held.memory is not None  # noqa: S101 - promised segments have no fd yet
        if isinstance(held.memory, KeptSegment):
            return held.memory.export()
        return self.backend(held.device).export(held.memory)

    def take_back(self, segment: int, device: str, memory: KeptSegment) -> None:
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
                self._segments[segment].blobs.add(blob.digest)
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

    def plan(self, device: str, token: str, blobs: Sequence[Blob]) -> PublishPlan:
        """Say where each blob of a publisher goes: blobs that are here already stay, the others get new segments.

        The new segments are promised (and count for the limit), but not allocated: that happens one at a time, when
        the publisher is ready to fill them, so that it can free originals in between.

        Raises:
            ProtocolError: a digest comes with another size than the store knows for it.
            OutOfMemoryError: the limit of the device has no room for them.
        """
        sizes: dict[bytes, int] = {}
        for blob in blobs:
            known = self._blobs.get((device, blob.digest))
            expected = known.nbytes if known else sizes.setdefault(blob.digest, blob.nbytes)
            if expected != blob.nbytes:
                raise ProtocolError(f"blob {blob.digest.hex()[:16]} has {expected} bytes, not {blob.nbytes}")
        layout = pack(list(sizes.values()))
        self._check_limit(device, sum(layout.sizes))
        ids = [new_id() for _ in layout.sizes]
        for segment, nbytes in zip(ids, layout.sizes, strict=True):
            self._segments[segment] = HeldSegment(segment, device, nbytes, writer=token)
        fresh = dict(zip(sizes, layout.placements, strict=True))
        places: list[Place] = []
        for blob in blobs:
            known = self._blobs.get((device, blob.digest))
            if known is not None:
                known.holders.add(token)
                places.append(Place(known.segment, known.offset, new=False))
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

    def seal(self, plan: PublishPlan) -> None:
        """Make what was written immutable. Raises :class:`MemoryBackendError` while it is mapped for writing."""
        for segment in plan.segments:
            held = self._segments[segment]
            if held.memory is not None:
                self.backend(held.device).seal(held.memory)

    def verification(self, plan: PublishPlan) -> Callable[[], None]:
        """What digests the bytes that were written, where the host can read them.

        To be called in a thread, after :meth:`seal`. It has a hold of its own on the segments, so that they may be
        dropped meanwhile.

        What it raises: :class:`DigestMismatchError` when bytes are not those of their digest.
        """
        parts: list[Part] = []
        try:
            for segment in plan.segments:
                held = self._segments[segment]
                backend = self.backend(held.device)
                if held.memory is None or not backend.host_readable:
                    continue  # where the host cannot read, the publisher digests its copy where it lies
                fd = backend.export(held.memory)
                try:
                    mapping = MemoryMapping(backend, backend.import_fd(fd, held.nbytes))
                finally:
                    os.close(fd)
                placed = zip(plan.blobs, plan.places, strict=True)
                parts.append((mapping, [(blob, at.offset) for blob, at in placed if at.new and at.segment == segment]))
        except BaseException:
            _close(parts)
            raise
        return lambda: verify(parts)

    def commit(self, key: str, plan: PublishPlan) -> None:
        """Make the plan's blobs shared. Where another model brought a blob meanwhile, that copy counts for both."""
        for blob, place in zip(plan.blobs, plan.places, strict=True):
            device = self._segments[place.segment].device
            known = self._blobs.get((device, blob.digest))
            if known is None:
                known = self._blobs[device, blob.digest] = HeldBlob(blob.nbytes, place.segment, place.offset)
                self._segments[place.segment].blobs.add(blob.digest)
            known.holders.discard(plan.token)
            known.holders.add(key)
        for segment in plan.segments:
            self._segments[segment].writer = None
        self._sweep(plan.segments)

    def drop(self, holder: str) -> None:
        """Forget a model's key or a publisher's token: blobs that only it held, and segments that it was writing."""
        touched: set[int] = {segment for segment, held in self._segments.items() if held.writer == holder}
        for segment in touched:
            self._segments[segment].writer = None
        for (device, digest), blob in list(self._blobs.items()):
            if holder in blob.holders:
                blob.holders.discard(holder)
                if not blob.holders:
                    del self._blobs[device, digest]
                    self._segments[blob.segment].blobs.discard(digest)
                    touched.add(blob.segment)
        self._sweep(touched)

    def close(self) -> None:
        """Release everything."""
        for held in self._segments.values():
            self._release(held)
        self._segments.clear()
        self._blobs.clear()

    def _sweep(self, segments: Iterable[int]) -> None:
        for segment in list(segments):
            held = self._segments.get(segment)
            if held is not None and not held.blobs and held.writer is None:
                self._release(held)
                del self._segments[segment]
                self.released(segment)

    def _release(self, held: HeldSegment) -> None:
        if isinstance(held.memory, KeptSegment):
            held.memory.release()
        elif held.memory is not None:
            self.backend(held.device).release(held.memory)

    def _check_limit(self, device: str, nbytes: int) -> None:
        limit = self.limits.get(device)
        used = sum(held.nbytes for held in self._segments.values() if held.device == device)
        if limit is not None and used + nbytes > limit:
            raise OutOfMemoryError(
                f"no room on {device}: {nbytes} bytes are needed, {max(0, limit - used)} of the limit of {limit} are "
                "free; "
                "remove models that nobody uses (`wooly models`, `wooly rm KEY`) or raise --max-resident"
            )


Part = tuple[MemoryMapping, list[tuple[Blob, int]]]
"""A segment, and the blobs in it (with their first bytes) that are to be digested."""


def verify(parts: Sequence[Part]) -> None:
    """Digest what lies in segments, and close the mappings. Raises :class:`DigestMismatchError`."""
    try:
        for mapping, blobs in parts:
            mapping.map(Access.READ)
            for blob, offset in blobs:
                found = digest_at(mapping.address + offset, blob.nbytes)
                if found != blob.digest:
                    raise DigestMismatchError(
                        f"bytes published as {blob.digest.hex()[:16]} are {found.hex()[:16]}: not accepted"
                    )
    finally:
        _close(parts)


def _close(parts: Sequence[Part]) -> None:
    for mapping, _ in parts:
        mapping.close()
