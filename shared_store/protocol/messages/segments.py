"""Segments and locations of blobs, as messages describe them."""

from __future__ import annotations

import msgspec


class SegmentInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A segment of ``nbytes`` bytes. Unless it is ``promised``, the message carries its fd, in order of the segments.

    A promised segment is not allocated yet; its publisher sends :class:`Fill` for it.
    """

    id: int
    nbytes: int
    promised: bool = False


class BlobPlace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Location of a blob: index into the message's ``segments``, and offset in bytes.

    ``new`` is set in the reply to a plan, for blobs that the publisher must write.
    """

    segment: int
    offset: int
    new: bool = False


class RestBlob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A blob of other models in a segment that returns: index into the message's ``segments``, offset and size."""

    segment: int
    offset: int
    nbytes: int
    digest: bytes
