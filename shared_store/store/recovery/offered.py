"""A model of an earlier store, as its keeper recorded it or a client offers it, and the checks of both.

A model whose manifest, locations and segments contradict each other is refused, and so is memory that does not match
its record.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shared_store.base import manifest as manifests
from shared_store.base.errors import MemoryBackendError, OfferRefusedError, ProtocolError
from shared_store.base.manifest import Manifest
from shared_store.memory import Backend
from shared_store.protocol.keeper_messages import ModelRecord, SegmentRecord
from shared_store.store.state.grace import Grace


@dataclass(frozen=True)
class OfferedModel:
    """A model of an earlier store: ``locations`` are (segment id, first byte), ``segments`` sizes in bytes by id."""

    data: bytes
    manifest: Manifest
    locations: tuple[tuple[int, int], ...]
    segments: Mapping[int, int]

    @staticmethod
    def read(
        key: str, data: bytes, locations: tuple[tuple[int, int], ...], segments: Mapping[int, int]
    ) -> OfferedModel:
        """Check that the parts agree with each other. Raises :class:`OfferRefusedError`."""
        try:
            manifest = manifests.decode(data)
        except ProtocolError as error:
            raise OfferRefusedError(str(error)) from error
        if manifest.key != key:
            raise OfferRefusedError(f"the manifest of {key} is that of {manifest.key}")
        if len(locations) != len(manifest.blobs):
            raise OfferRefusedError(f"{key} has {len(manifest.blobs)} blobs and {len(locations)} locations")
        for blob, (segment, offset) in zip(manifest.blobs, locations, strict=True):
            if segment not in segments or offset < 0 or offset + blob.nbytes > segments[segment]:
                raise OfferRefusedError(f"{key}: blob {blob.digest.hex()[:16]} is not inside segment {segment}")
        return OfferedModel(data, manifest, locations, segments)

    @staticmethod
    def recorded(record: ModelRecord, segments: Mapping[int, SegmentRecord]) -> OfferedModel:
        """Read the model from a keeper's record. Raises :class:`OfferRefusedError`."""
        sizes = {number: segments[number].nbytes for number in record.segments if number in segments}
        found = OfferedModel.read(record.key, record.manifest, record.places, sizes)
        for number in sizes:
            if segments[number].device != found.manifest.device:
                raise OfferRefusedError(f"{record.key} is on {found.manifest.device}, its segment {number} is not")
        return found

    def check_against(self, grace: Grace) -> None:
        """Raise :class:`OfferRefusedError` if the model contradicts the journal of the earlier store."""
        known = grace.model(self.manifest.key)
        if known is not None and (known.manifest != self.data or known.places != self.locations):
            raise OfferRefusedError(f"{self.manifest.key} was another model: the journal disagrees")
        for number, nbytes in self.segments.items():
            record = grace.segment(number)
            if record is not None and (record.device, record.nbytes) != (self.manifest.device, nbytes):
                raise OfferRefusedError(f"segment {number} was another segment: the journal disagrees")


def check_memory(backend: Backend, fd: int, nbytes: int) -> None:
    """Raise :class:`MemoryBackendError` if a descriptor is not a sealed segment of ``nbytes`` bytes."""
    segment = backend.import_fd(fd, nbytes)
    try:
        if os.fstat(fd).st_size not in {0, nbytes}:  # 0: not a file with a size
            raise MemoryBackendError(f"a segment of {os.fstat(fd).st_size} bytes, where {nbytes} were announced")
        if not backend.sealed(segment):
            raise MemoryBackendError("the segment is not sealed: it can still be written")
    finally:
        backend.release(segment)
