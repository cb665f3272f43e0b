"""A model's blobs in this process: segments mapped once, blobs found in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from shared_store.base.manifest import Blob
from shared_store.memory import Access, Backend, Mapping
from shared_store.protocol import messages
from shared_store.torch.mapping_registry import register
from shared_store.torch.views import bytes_in, part_of, storage_of

REPLICA_MIN_BYTES = 1 << 20
"""A blob that one model has more than once is copied below this size, and mapped once more from it on."""


class MappedModel:
    """The blobs of one model. Tensors made of them keep their mappings alive; this object need not live on."""

    def __init__(
        self,
        backend: Backend,
        blobs: Sequence[Blob],
        places: Sequence[messages.BlobPlace],
        segments: Sequence[messages.SegmentInfo],
        fds: Sequence[int],
        before: MappedModel | None = None,
    ) -> None:
        """Take over the segments of an answer (its fds are closed here); nothing is mapped yet.

        Promised segments have no fd; :meth:`add` brings them in later. Segments that were mapped ``before`` keep their
        mappings, and so their addresses.
        """
        self._backend = backend
        self._before = before.mappings_by_id() if before else {}
        self.places = tuple(places)
        self.segments = tuple(segments)
        self._blobs = tuple(blobs)
        self._mappings: dict[int, Mapping] = {}
        self._storages: dict[Mapping, torch.UntypedStorage] = {}
        self._replicas: dict[tuple[int, int], Mapping] = {}
        copies: Counter[bytes] = Counter()
        self.occurrence: list[int] = []
        """For each blob: how many of the same digest come before it in this model."""
        for blob in blobs:
            self.occurrence.append(copies[blob.digest])
            copies[blob.digest] += 1
        existing = [index for index, info in enumerate(segments) if not info.promised]
        for index, fd in zip(existing, fds, strict=True):
            self._import(index, fd)
        self._before = {}

    def mappings(self) -> list[tuple[int, Mapping]]:
        """Every mapping, with the index of its segment."""
        again = ((index, mapping) for (index, _), mapping in self._replicas.items())
        return [*self._mappings.items(), *again]

    def mappings_by_id(self) -> dict[tuple[int, int], Mapping]:
        """Every mapping, by its segment's id and which repetition of blobs it is for (0: it is the segment's first)."""
        first = {(self.segments[index].id, 0): mapping for index, mapping in self._mappings.items()}
        again = {(self.segments[index].id, number): mapping for (index, number), mapping in self._replicas.items()}
        return first | again

    def add(self, index: int, fd: int) -> None:
        """Bring in a promised segment, to be written: by its index, with its fd (closed here)."""
        self._import(index, fd)
        self._mappings[index].map(Access.WRITE)

    def has(self, index: int) -> bool:
        """Whether the segment with this index is here (a promised one is not, until it is added)."""
        return index in self._mappings

    def map_for_reading(self) -> None:
        """Map all segments that are here for reading, each at its address."""
        for mapping in (*self._mappings.values(), *self._replicas.values()):
            mapping.map(Access.READ)

    def _import(self, index: int, fd: int) -> None:
        self._mappings[index] = self._mapping(index, 0, fd)
        repeated = {
            self.occurrence[number]
            for number, place in enumerate(self.places)
            if place.segment == index and self.occurrence[number] and self._blobs[number].nbytes >= REPLICA_MIN_BYTES
        }
        for occurrence in repeated:
            again = self._replicas[index, occurrence] = self._mapping(index, occurrence, fd)
            again.map(Access.READ)

    def _mapping(self, index: int, occurrence: int, fd: int) -> Mapping:
        """The mapping that there was, or a new one."""
        found = self.segments[index]
        known = self._before.get((found.id, occurrence))
        return known or register(Mapping(self._backend, self._backend.import_fd(fd, found.nbytes)))

    def unmap(self) -> None:
        """Unmap all; addresses stay."""
        for mapping in (*self._mappings.values(), *self._replicas.values()):
            mapping.unmap()

    def shared(self, index: int, min_bytes: int) -> bool:
        """Whether the blob is to be mapped: large enough, and not a small repetition of another."""
        nbytes = self._blobs[index].nbytes
        return nbytes >= max(min_bytes, REPLICA_MIN_BYTES if self.occurrence[index] else 1)

    def where(self, index: int) -> tuple[int, int]:
        """The blob's segment (by the store's number) and first byte."""
        place = self.places[index]
        return self.segments[place.segment].id, place.offset

    def storage(self, index: int) -> torch.UntypedStorage:
        """The blob's storage, its own; a repetition of a blob has a mapping of its own, too."""
        place, nbytes = self.places[index], self._blobs[index].nbytes
        mapping = self._replicas.get((place.segment, self.occurrence[index]), self._mappings[place.segment])
        whole = self._storages.get(mapping)
        if whole is None:
            whole = self._storages[mapping] = storage_of(mapping)
        return part_of(whole, place.offset, nbytes)

    def bytes(self, index: int) -> torch.Tensor:
        """The blob's bytes (uint8, shape ``(nbytes,)``)."""
        return bytes_in(self.storage(index))

    def covers(self, address: int) -> bool:
        """Whether an address lies in this model's mappings."""
        mappings = (*self._mappings.values(), *self._replicas.values())
        return any(mapping.address <= address < mapping.address + mapping.nbytes for mapping in mappings)

    def private_bytes(self) -> int:
        """Bytes of mapped memory that this process wrote to, and so holds for itself."""
        return sum(mapping.private_bytes() for mapping in (*self._mappings.values(), *self._replicas.values()))
