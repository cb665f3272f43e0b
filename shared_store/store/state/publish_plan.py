"""The plan of a publication: a location for each blob, in segments that exist and in segments that are promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared_store.base.errors import ProtocolError
from shared_store.base.layout import Layout, pack, restrict
from shared_store.base.manifest import Blob
from shared_store.store.state.blobs import Blobs


@dataclass(frozen=True)
class Location:
    """Location of a blob of a plan (segment id, first byte). ``new``: its publisher must write it."""

    segment: int
    offset: int
    new: bool


@dataclass(frozen=True)
class PublishPlan:
    """A plan, as its publisher received it: one location for each blob, and the ids of the promised segments."""

    token: str
    blobs: tuple[Blob, ...]
    locations: tuple[Location, ...]
    segments: tuple[int, ...]

    @property
    def existing(self) -> tuple[int, ...]:
        """Ids of the committed segments that the plan counts on."""
        used = dict.fromkeys(location.segment for location in self.locations)
        return tuple(segment for segment in used if segment not in self.segments)

    @property
    def written(self) -> dict[int, list[tuple[Blob, int]]]:
        """The blobs that the publisher writes, with their first bytes, by promised segment."""
        found: dict[int, list[tuple[Blob, int]]] = {segment: [] for segment in self.segments}
        for blob, location in zip(self.blobs, self.locations, strict=True):
            if location.new:
                found[location.segment].append((blob, location.offset))
        return found


@dataclass(frozen=True)
class Draft:
    """A plan before its segments are promised.

    Attributes:
        token: the owner of its references.
        device: where the segments will be allocated.
        blobs: all blobs of the model, in the publisher's order.
        sizes: bytes of the blobs that are not in the store, by digest.
        layout: placements for those blobs, in the same order.
    """

    token: str
    device: str
    blobs: tuple[Blob, ...]
    sizes: dict[bytes, int]
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of the segments that the plan needs."""
        return sum(self.layout.sizes)


def draft(known: Blobs, device: str, token: str, blobs: Sequence[Blob], preferred: Layout | None = None) -> Draft:
    """Lay out the blobs that are not in the store. The state does not change.

    Args:
        known: the committed blobs.
        device: where the segments will be allocated.
        token: the owner of the plan's references.
        blobs: all blobs of the model.
        preferred: an offset per blob, stable because the client has mapped it; see :func:`restrict`.

    Raises:
        ProtocolError: a digest has another size than in the store, or the preferred layout is not possible.
    """
    sizes: dict[bytes, int] = {}
    new: list[int] = []
    for index, blob in enumerate(blobs):
        entry = known.get(device, blob.digest)
        if entry is None and blob.digest not in sizes:
            new.append(index)
        expected = entry.nbytes if entry else sizes.setdefault(blob.digest, blob.nbytes)
        if expected != blob.nbytes:
            raise ProtocolError(f"blob {blob.digest.hex()[:16]} has {expected} bytes, not {blob.nbytes}")
    if preferred is None:
        layout = pack(list(sizes.values()))
    else:
        try:
            layout = restrict(preferred, [blob.nbytes for blob in blobs], new)
        except ValueError as error:
            raise ProtocolError(f"the plan's preferred layout is not possible: {error}") from error
    return Draft(token, device, tuple(blobs), sizes, layout)
