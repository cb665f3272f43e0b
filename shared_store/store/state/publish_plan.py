"""The plan of a publication: a location for each blob, in segments that exist and in segments that are promised.

A promised segment is new, or it returns: it is in a lower tier, and the publisher writes the blobs that it has. Blobs
of other models in it are its *rest*, which the publisher or the store writes from its host copy. A blob that is only in
a segment that cannot return is written to a new segment, like one that the store does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    """A plan, as its publisher received it: one location for each blob, and the ids of the promised segments.

    ``returning``: those of the promised segments that return from a lower tier. ``rest``: blobs of other models in
    them, with their first bytes.
    """

    token: str
    blobs: tuple[Blob, ...]
    locations: tuple[Location, ...]
    segments: tuple[int, ...]
    returning: tuple[int, ...] = ()
    rest: Mapping[int, Sequence[tuple[Blob, int]]] = field(default_factory=dict)

    @property
    def existing(self) -> tuple[int, ...]:
        """Ids of the committed segments that the plan counts on."""
        used = dict.fromkeys(location.segment for location in self.locations)
        return tuple(segment for segment in used if segment not in self.segments)

    @property
    def written(self) -> dict[int, list[tuple[Blob, int]]]:
        """The blobs that promised segments must have at the commit, with their first bytes, by segment."""
        found = {segment: list(self.rest.get(segment, ())) for segment in self.segments}
        for blob, location in zip(self.blobs, self.locations, strict=True):
            if location.new:
                found[location.segment].append((blob, location.offset))
        return found


@dataclass(frozen=True)
class Elsewhere:
    """Blobs that are in the store, but not on their device.

    Attributes:
        digests: of all of them.
        segments: bytes of the segments that can return for this plan, by id.
        places: locations (segment id, first byte) of the blobs in those, by digest.
        rest: blobs of other models in those, with their first bytes.
    """

    digests: frozenset[bytes] = frozenset()
    segments: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[bytes, tuple[int, int]] = field(default_factory=dict)
    rest: Mapping[int, Sequence[tuple[Blob, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """A plan before its segments are promised.

    Attributes:
        token: the owner of its references.
        device: where the segments will be allocated.
        blobs: all blobs of the model, in the publisher's order.
        sizes: bytes of the blobs that new segments are needed for, by digest.
        layout: placements for those blobs, in the same order.
        elsewhere: blobs that are not on the device, and the segments that return.
    """

    token: str
    device: str
    blobs: tuple[Blob, ...]
    sizes: dict[bytes, int]
    layout: Layout
    elsewhere: Elsewhere = field(default_factory=Elsewhere)

    @property
    def nbytes(self) -> int:
        """Bytes of the segments that the plan needs."""
        return sum(self.layout.sizes) + sum(self.elsewhere.segments.values())


def draft(
    known: Blobs,
    device: str,
    token: str,
    blobs: Sequence[Blob],
    preferred: Layout | None = None,
    elsewhere: Elsewhere | None = None,
) -> Draft:
    """Lay out the blobs that are not in the store. The state does not change.

    Args:
        known: the committed blobs.
        device: where the segments will be allocated.
        token: the owner of the plan's references.
        blobs: all blobs of the model.
        preferred: an offset per blob, stable because the client has mapped it; see :func:`restrict`.
        elsewhere: those of the blobs that are not on the device; None: all committed blobs are.

    Raises:
        ProtocolError: a digest has another size than in the store, or the preferred layout is not possible.
    """
    elsewhere = elsewhere or Elsewhere()
    replaced = elsewhere.digests - elsewhere.places.keys()
    sizes: dict[bytes, int] = {}
    new: list[int] = []
    for index, blob in enumerate(blobs):
        entry = known.get(device, blob.digest)
        missing = entry is None or blob.digest in replaced
        if missing and blob.digest not in sizes:
            new.append(index)
        expected = entry.nbytes if entry else sizes.get(blob.digest, blob.nbytes)
        if expected != blob.nbytes:
            raise ProtocolError(f"blob {blob.digest.hex()[:16]} has {expected} bytes, not {blob.nbytes}")
        if missing:
            sizes[blob.digest] = blob.nbytes
    if preferred is None:
        layout = pack(list(sizes.values()))
    else:
        try:
            layout = restrict(preferred, [blob.nbytes for blob in blobs], new)
        except ValueError as error:
            raise ProtocolError(f"the plan's preferred layout is not possible: {error}") from error
    return Draft(token, device, tuple(blobs), sizes, layout, elsewhere)
