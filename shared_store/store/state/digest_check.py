"""Digests of blobs that lie in the store's segments, taken in a thread.

A check has a hold of its own on what it looks at, so that segments may be dropped meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared_store.base.digest import digest_at
from shared_store.base.manifest import Blob
from shared_store.memory import Access, Backend, Mapping, export
from shared_store.memory.backend import Segment

Part = tuple[Backend, Segment, Sequence[tuple[Blob, int]]]
"""A segment in memory that the host can read, and blobs in it with their first bytes."""


class Check:
    """Blobs that are to be digested where they lie. :meth:`wrong` is called once."""

    def __init__(self, parts: Iterable[Part]) -> None:
        """Take hold of the segments."""
        self._parts: list[tuple[Mapping, Sequence[tuple[Blob, int]]]] = []
        try:
            for backend, segment, blobs in parts:
                self._parts.append((mapping_of(backend, segment), blobs))
        except BaseException:
            self._close()
            raise

    def wrong(self) -> list[tuple[Blob, bytes]]:
        """Blobs whose bytes are not those of their digest, with the digest that they have; lets go of the segments."""
        try:
            return [different for mapping, blobs in self._parts for different in _differing(mapping, blobs)]
        finally:
            self._close()

    def _close(self) -> None:
        for mapping, _ in self._parts:
            mapping.close()
        self._parts.clear()


def mapping_of(backend: Backend, segment: Segment) -> Mapping:
    """A mapping with a hold of its own on a segment that the store has."""
    with export(backend, segment) as fd:
        return Mapping(backend, backend.import_fd(fd.fileno(), segment.nbytes))


def _differing(mapping: Mapping, blobs: Iterable[tuple[Blob, int]]) -> list[tuple[Blob, bytes]]:
    mapping.map(Access.READ)
    found = [(blob, digest_at(mapping.address + offset, blob.nbytes)) for blob, offset in blobs]
    return [(blob, digest) for blob, digest in found if digest != blob.digest]
