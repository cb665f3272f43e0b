"""What a store has of the one before it: models whose memory its keeper held, and models that are still awaited.

Awaited is a model that only the journal knows: keeper and store were killed together, and the memory lives on in
clients. For a grace time an open of such a model waits for one of them to offer it, instead of loading it again.

Nothing is believed that does not agree: a model whose manifest, places and segments contradict each other is dropped,
and so is memory that is not what its record says.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass

from shared_store.base import manifest as manifests
from shared_store.base.errors import MemoryBackendError, OfferRefusedError, ProtocolError
from shared_store.base.manifest import Manifest
from shared_store.memory import Backend
from shared_store.protocol import keeper_messages
from shared_store.protocol.durable_state import DurableState

GRACE_S = 5.0
"""Seconds that clients have to come back after a restart. They try again within one second."""

MORE_S = 2.0
"""Seconds that they have at least after a model that one of them brought: it may have others, one after the other."""

LONGEST_S = 60.0
"""Seconds after which they have had their time in any case."""


class Recovery:
    """The time after a restart. One that recovers from nothing is over at once."""

    def __init__(self, held: DurableState | None = None) -> None:
        """``held``: what there was of an earlier store."""
        self._records = dict(held.models) if held else {}
        self._segments = {number: found.record for number, found in held.segments.items()} if held else {}
        self._awaited: set[str] = set()
        self._coming: dict[str, asyncio.Event] = {}
        self.until = time.monotonic() + GRACE_S if self._records else 0.0
        """When the grace time ends, on the monotonic clock."""
        self._latest = time.monotonic() + LONGEST_S

    def pinned(self, key: str) -> bool:
        """Whether the model was pinned."""
        return key in self._records and self._records[key].pinned

    def forgotten(self, key: str) -> bool:
        """Whether the store before this one had other models or memory, and this model no more.

        Who still reads it then read it when it was quarantined.
        """
        return bool(self._records or self._segments) and key not in self._records

    @property
    def active(self) -> bool:
        """Whether readers may still come back: nothing that seems unused should be given up yet."""
        return time.monotonic() < self.until

    def came(self) -> None:
        """A client has brought a model: there may be more to come."""
        if self._awaited:
            self.until = min(self._latest, max(self.until, time.monotonic() + MORE_S))

    def await_clients(self, key: str) -> None:
        """Only clients have the model: let whoever opens it wait for them."""
        self._awaited.add(key)
        self.expect(key)

    def expect(self, key: str) -> None:
        """Let whoever opens the model wait until it is :meth:`settled`."""
        self._coming.setdefault(key, asyncio.Event())

    def settled(self, key: str) -> None:
        """The model is here, or what was offered is not it."""
        coming = self._coming.pop(key, None)
        if coming is not None:
            coming.set()

    def end(self, busy: Container[str]) -> list[str]:
        """The grace time is over: nobody waits any more for models that clients have, but for the ``busy`` ones.

        Returns the keys of those that were waited for; some of them may have come.
        """
        over = sorted(key for key in self._awaited if key not in busy)
        for key in over:
            self._awaited.discard(key)
            self.settled(key)
        return over

    @property
    def awaited(self) -> bool:
        """Whether clients may still bring models."""
        return bool(self._awaited)

    @property
    def segments(self) -> tuple[int, ...]:
        """Ids of the segments that there were."""
        return tuple(self._segments)

    async def wait(self, key: str, gone: asyncio.Event) -> None:
        """Wait while the model is expected, or until the client that asks is gone."""
        coming = self._coming.get(key)
        if coming is None:
            return
        waits = [asyncio.ensure_future(event.wait()) for event in (coming, gone)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()

    def agree(self, offered: OfferedModel) -> None:
        """Raise :class:`OfferRefusedError` where an offer contradicts what the journal says of the model."""
        known = self._records.get(offered.manifest.key)
        if known is not None and (known.manifest != offered.data or known.places != offered.places):
            raise OfferRefusedError(f"{offered.manifest.key} was another model: the journal disagrees")
        for number, nbytes in offered.segments.items():
            record = self._segments.get(number)
            if record is not None and (record.device, record.nbytes) != (offered.manifest.device, nbytes):
                raise OfferRefusedError(f"segment {number} was another segment: the journal disagrees")


@dataclass(frozen=True)
class OfferedModel:
    """A model as it lay in an earlier store: ``places`` are (segment id, first byte), ``segments`` sizes by id."""

    data: bytes
    manifest: Manifest
    places: tuple[tuple[int, int], ...]
    segments: Mapping[int, int]

    @staticmethod
    def read(key: str, data: bytes, places: tuple[tuple[int, int], ...], segments: Mapping[int, int]) -> OfferedModel:
        """Check that the parts agree. Raises :class:`OfferRefusedError`."""
        try:
            manifest = manifests.decode(data)
        except ProtocolError as error:
            raise OfferRefusedError(str(error)) from error
        if manifest.key != key:
            raise OfferRefusedError(f"the manifest of {key} is that of {manifest.key}")
        if len(places) != len(manifest.blobs):
            raise OfferRefusedError(f"{key} has {len(manifest.blobs)} blobs and {len(places)} places")
        for blob, (segment, offset) in zip(manifest.blobs, places, strict=True):
            if segment not in segments or offset < 0 or offset + blob.nbytes > segments[segment]:
                raise OfferRefusedError(f"{key}: blob {blob.digest.hex()[:16]} does not lie in segment {segment}")
        return OfferedModel(data, manifest, places, segments)

    @staticmethod
    def noted(
        record: keeper_messages.ModelRecord, segments: Mapping[int, keeper_messages.SegmentRecord]
    ) -> OfferedModel:
        """The same of a keeper's record. Raises :class:`OfferRefusedError`."""
        own = {number: segments[number].nbytes for number in record.segments if number in segments}
        found = OfferedModel.read(record.key, record.manifest, record.places, own)
        for number in own:
            if segments[number].device != found.manifest.device:
                raise OfferRefusedError(f"{record.key} is on {found.manifest.device}, its segment {number} is not")
        return found


def check_memory(backend: Backend, fd: int, nbytes: int) -> None:
    """Raise :class:`MemoryBackendError` where an fd is no finished segment of this size."""
    segment = backend.import_fd(fd, nbytes)
    try:
        if os.fstat(fd).st_size not in {0, nbytes}:  # 0: not a file with a size
            raise MemoryBackendError(f"a segment of {os.fstat(fd).st_size} bytes, where {nbytes} were announced")
        if not backend.sealed(segment):
            raise MemoryBackendError("it can still be written to")
    finally:
        backend.release(segment)
