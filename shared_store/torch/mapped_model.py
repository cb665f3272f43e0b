"""A model's segments, mapped in this process, and the blobs in them."""

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
"""A blob that occurs more than once in a model is mapped again for each occurrence from this size on, else copied."""


class MappedModel:
    """The blobs of one model. Tensors over them keep their mappings alive, without this object.

    Attributes:
        places: location of each blob.
        segments: the segments that the locations number.
        occurrence: for each blob, the number of earlier blobs of the model with the same digest.
    """

    def __init__(
        self,
        backend: Backend,
        blobs: Sequence[Blob],
        places: Sequence[messages.BlobPlace],
        segments: Sequence[messages.SegmentInfo],
        fds: Sequence[int],
        before: MappedModel | None = None,
    ) -> None:
        """Import the segments of an answer of the store; nothing is mapped yet.

        Args:
            backend: of the model's device.
            blobs: in the manifest's order.
            places: location of each blob.
            segments: those that ``places`` numbers.
            fds: a descriptor, borrowed, for each segment that exists. Segments that are only planned are imported by
                :meth:`add`.
            before: an earlier answer about the model. Its segments keep their mappings, and so their addresses.
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
        for blob in blobs:
            self.occurrence.append(copies[blob.digest])
            copies[blob.digest] += 1
        existing = [index for index, info in enumerate(segments) if not info.promised]
        for index, fd in zip(existing, fds, strict=True):
            self._import(index, fd)
        self._before = {}

    def mappings(self) -> list[tuple[int, Mapping]]:
        """Return every mapping, with the index of its segment."""
        again = ((index, mapping) for (index, _), mapping in self._replicas.items())
        return [*self._mappings.items(), *again]

    def mappings_by_id(self) -> dict[tuple[int, int], Mapping]:
        """Return every mapping by its segment's id and the occurrence that it is for (0: the segment's first)."""
        first = {(self.segments[index].id, 0): mapping for index, mapping in self._mappings.items()}
        again = {(self.segments[index].id, number): mapping for (index, number), mapping in self._replicas.items()}
        return first | again

    def add(self, index: int, fd: int) -> None:
        """Import a segment that was only planned, and map it for writing.

        Args:
            index: of the segment.
            fd: its descriptor, borrowed.
        """
        self._import(index, fd)
        self._mappings[index].map(Access.WRITE)

    def has(self, index: int) -> bool:
        """Return True if a segment (by its index) was imported."""
        return index in self._mappings

    def address(self, index: int) -> int:
        """Return the first address of an imported segment (by its index)."""
        return self._mappings[index].address

    def map_for_reading(self) -> None:
        """Map all imported segments for reading, each at its address."""
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
        """Return the earlier mapping, or a new one."""
        found = self.segments[index]
        known = self._before.get((found.id, occurrence))
        return known or register(Mapping(self._backend, self._backend.import_fd(fd, found.nbytes)))

    def unmap(self) -> None:
        """Unmap all segments; their addresses stay reserved."""
        for mapping in (*self._mappings.values(), *self._replicas.values()):
            mapping.unmap()

    def shared(self, index: int, min_bytes: int) -> bool:
        """Return True if a blob is to be mapped: it has ``min_bytes``, and is not a small repetition of another."""
        nbytes = self._blobs[index].nbytes
        return nbytes >= max(min_bytes, REPLICA_MIN_BYTES if self.occurrence[index] else 1)

    def location(self, index: int) -> tuple[int, int]:
        """Return the id of a blob's segment, and the blob's first byte in it."""
        place = self.places[index]
        return self.segments[place.segment].id, place.offset

    def storage(self, index: int) -> torch.UntypedStorage:
        """Return a storage of exactly a blob's bytes. Occurrences of one blob have different addresses."""
        place, nbytes = self.places[index], self._blobs[index].nbytes
        mapping = self._replicas.get((place.segment, self.occurrence[index]), self._mappings[place.segment])
        whole = self._storages.get(mapping)
        if whole is None:
            whole = self._storages[mapping] = storage_of(mapping)
        return part_of(whole, place.offset, nbytes)

    def bytes(self, index: int) -> torch.Tensor:
        """Return a blob's bytes: uint8, shape ``(nbytes,)``, not copied."""
        return bytes_in(self.storage(index))

    def covers(self, address: int) -> bool:
        """Return True if an address is in a mapping of this model."""
        mappings = (*self._mappings.values(), *self._replicas.values())
        return any(mapping.address <= address < mapping.address + mapping.nbytes for mapping in mappings)
