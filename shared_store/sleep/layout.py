"""The layout of a model's segments when this process mapped them, and comparisons with later layouts. Pure functions.

Tensors and captured CUDA graphs contain addresses inside of segments. So a process can map a segment at an old address
only if the segment has the same size and every blob of the model at the same offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared_store.base.manifest import Blob
from shared_store.protocol import messages


@dataclass(frozen=True)
class SegmentLayout:
    """A segment's size in bytes, and the offset in it of each blob, by the blob's index in the manifest."""

    nbytes: int
    offsets: Mapping[int, int]


@dataclass(frozen=True)
class ModelLayout:
    """The segments of a model, and the location of each blob, in the manifest's order."""

    segments: tuple[SegmentLayout, ...]
    locations: tuple[messages.BlobPlace, ...]

    @classmethod
    def of(cls, places: Sequence[messages.BlobPlace], segments: Sequence[messages.SegmentInfo]) -> ModelLayout:
        """Return the layout that the store described."""
        offsets: list[dict[int, int]] = [{} for _ in segments]
        for index, place in enumerate(places):
            offsets[place.segment][index] = place.offset
        return cls(
            tuple(SegmentLayout(info.nbytes, found) for info, found in zip(segments, offsets, strict=True)),
            tuple(messages.BlobPlace(place.segment, place.offset) for place in places),
        )

    @property
    def sizes(self) -> list[int]:
        """The size of each segment in bytes."""
        return [segment.nbytes for segment in self.segments]

    def unchanged(self, index: int, attached: messages.Attached) -> int | None:
        """Return the index in ``attached`` of the segment that has the layout of segment ``index``, or None.

        ``attached`` must describe the same blobs in the same order.
        """
        former = self.segments[index]
        found = {attached.places[blob].segment for blob in former.offsets}
        if len(found) != 1:
            return None
        (segment,) = found
        same = attached.segments[segment].nbytes == former.nbytes and all(
            attached.places[blob].offset == offset for blob, offset in former.offsets.items()
        )
        return segment if same else None

    def containing(self, offsets: Mapping[int, int], nbytes: int) -> int | None:
        """Return the index of the segment of ``nbytes`` bytes that has all these blobs at these offsets, or None."""
        found = {self.locations[blob].segment for blob in offsets}
        if len(found) != 1:
            return None
        (index,) = found
        former = self.segments[index]
        return index if former.nbytes == nbytes and offsets.items() <= former.offsets.items() else None


def contents(blobs: Sequence[Blob], offsets: Mapping[int, int]) -> list[tuple[Blob, int]]:
    """Return blobs with their offsets, from offsets by index."""
    return [(blobs[index], offset) for index, offset in offsets.items()]
